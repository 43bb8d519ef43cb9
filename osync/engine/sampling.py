"""How the next token is chosen: Ollama's options and the llama.cpp sampler chain made of them."""

from __future__ import annotations

import ctypes
import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from osync.errors import BadRequest

RANDOM_SEED = 0xFFFFFFFF
"""llama.cpp's own mark for "pick one"; -1 as Ollama counts."""
_INT32 = (1 << 31) - 1
_COOLEST = 1e-7
"""The lowest temperature but 0, as in Ollama: logits over less leave float32."""
_STRONGEST = 1e6
"""Of penalties: any more weighs the same, and sums of what float32 barely holds are infinite or no number."""


_BOUNDS = {
    "top_p": (0.0, 1.0),
    "min_p": (0.0, 1.0),
    "typical_p": (0.0, 1.0),
    "temperature": (0.0, _STRONGEST),
    "repeat_penalty": (0.0, _STRONGEST),
    "presence_penalty": (-_STRONGEST, _STRONGEST),
    "frequency_penalty": (-_STRONGEST, _STRONGEST),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Ollama's options that concern one request's tokens, with Ollama's defaults."""

    num_keep: int = 4
    seed: int = -1
    num_predict: int = -1
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    typical_p: float = 1.0
    repeat_last_n: int = 64
    temperature: float = 0.8
    repeat_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Bring what Ollama accepts and llama.cpp cannot compute with to the nearest that it can."""
        for name in _BOUNDS:
            value = getattr(self, name)
            if not math.isfinite(value):
                raise BadRequest(f"option {name!r} must be a finite number")
            low, high = _BOUNDS[name]
            if not low <= value <= high:
                object.__setattr__(self, name, min(max(value, low), high))
        if self.repeat_penalty <= 0:
            object.__setattr__(self, "repeat_penalty", 1.0)  # neutral, as in Ollama's own runner
        elif self.repeat_penalty < 1 / _STRONGEST:
            object.__setattr__(self, "repeat_penalty", 1 / _STRONGEST)
        if 0 < self.temperature < _COOLEST:
            object.__setattr__(self, "temperature", _COOLEST)

    def with_seed(self) -> SamplingOptions:
        """Return the same options with a random seed drawn where none was fixed."""
        if self.seed & RANDOM_SEED != RANDOM_SEED:
            return self
        return replace(self, seed=secrets.randbelow(RANDOM_SEED))

    @property
    def has_penalties(self) -> bool:
        """True if earlier tokens change the odds."""
        return self.repeat_last_n != 0 and (
            self.repeat_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0
        )

    def recent(self, tokens: Sequence[int]) -> tuple[int, ...]:
        """Return those of `tokens` that penalties look at."""
        if not self.has_penalties:
            return ()
        return tuple(tokens if self.repeat_last_n < 0 else tokens[-self.repeat_last_n :])


class Sampler:
    """A llama.cpp sampler chain of one sequence; used and freed in the engine's thread.

    The draw for a sequence's n-th token depends on the seed and n alone: a sequence that has to begin again in the
    middle, on another host, goes on with the very draws.
    """

    def __init__(
        self, api: Any, options: SamplingOptions, *, vocabulary_size: int, context_length: int,
        history: Sequence[int] = (), drawn: int = 0,
    ) -> None:  # fmt: skip
        self._api = api
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for part in _parts(api, options, vocabulary_size, context_length):
            api.llama_sampler_chain_add(self._chain, part)
        self._end = api.llama_sampler_chain_n(self._chain)
        self._seed = options.with_seed().seed & RANDOM_SEED
        self._is_random = options.temperature > 0
        # The largest logit itself: llama.cpp would first build a list of all candidates, ten times the work.
        self._logits = ctypes.c_float * vocabulary_size if not self._is_random and not options.has_penalties else None
        self._numpy = _numpy()
        self._drawn = drawn
        for token in history:
            api.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any, row: int) -> int:
        """Choose a token by the logits of batch row `row`, and remember it."""
        api, chain = self._api, self._chain
        if self._logits is not None:
            logits = self._logits.from_address(ctypes.addressof(api.llama_get_logits_ith(context, row).contents))
            return int(self._numpy.frombuffer(logits, self._numpy.float32).argmax())
        if self._is_random:
            if api.llama_sampler_chain_n(chain) > self._end:
                api.llama_sampler_free(api.llama_sampler_chain_remove(chain, self._end))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(_mixed(self._seed, self._drawn)))
            self._drawn += 1
        return int(api.llama_sampler_sample(chain, context, row))

    def free(self) -> None:
        """Give the chain's memory back."""
        chain, self._chain = self._chain, None
        if chain:
            self._api.llama_sampler_free(chain)


def _numpy() -> Any:
    import numpy  # only where there is an engine

    return numpy


def _parts(api: Any, options: SamplingOptions, vocabulary_size: int, context_length: int) -> list[Any]:
    parts = []
    if options.has_penalties:
        # llama.cpp allocates room for all of them at once.
        last = context_length if options.repeat_last_n < 0 else min(options.repeat_last_n, context_length)
        parts.append(
            api.llama_sampler_init_penalties(
                vocabulary_size,
                last,
                options.repeat_penalty,
                options.frequency_penalty,
                options.presence_penalty,
            )
        )
    if options.temperature <= 0:
        return [*parts, api.llama_sampler_init_greedy()]
    if options.top_k > 0:
        parts.append(api.llama_sampler_init_top_k(min(options.top_k, _INT32)))
    if options.typical_p < 1:
        parts.append(api.llama_sampler_init_typical(options.typical_p, 1))
    if options.top_p < 1:
        parts.append(api.llama_sampler_init_top_p(options.top_p, 1))
    if options.min_p > 0:
        parts.append(api.llama_sampler_init_min_p(options.min_p, 1))
    parts.append(api.llama_sampler_init_temp(options.temperature))
    return parts


def _mixed(seed: int, index: int) -> int:
    """Return a seed of its own for each index (the finalizer of MurmurHash3), never llama.cpp's "pick one"."""
    mixed = (seed + 0x9E3779B9 * (index + 1)) & RANDOM_SEED
    mixed = ((mixed ^ mixed >> 16) * 0x85EBCA6B) & RANDOM_SEED
    mixed = ((mixed ^ mixed >> 13) * 0xC2B2AE35) & RANDOM_SEED
    return (mixed ^ mixed >> 16) % RANDOM_SEED
