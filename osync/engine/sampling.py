"""How the next token is chosen: Ollama's options and the llama.cpp sampler chain made of them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from osync.errors import BadRequest

RANDOM_SEED = 0xFFFFFFFF
"""llama.cpp's own mark for "pick one"; -1 as Ollama counts."""
_INT32 = (1 << 31) - 1


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
        for name in ("top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty",
                     "frequency_penalty"):  # fmt: skip
            if not math.isfinite(getattr(self, name)):
                raise BadRequest(f"option {name!r} must be a finite number")
        if self.repeat_penalty <= 0:
            raise BadRequest("option 'repeat_penalty' must be greater than 0")

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
    """A llama.cpp sampler chain of one sequence; used and freed in the engine's thread."""

    def __init__(
        self, api: Any, options: SamplingOptions, *, vocabulary_size: int, context_length: int,
        history: Sequence[int] = (),
    ) -> None:  # fmt: skip
        self._api = api
        self._chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        for part in _parts(api, options, vocabulary_size, context_length):
            api.llama_sampler_chain_add(self._chain, part)
        for token in history:
            api.llama_sampler_accept(self._chain, token)

    def sample(self, context: Any, row: int) -> int:
        """Choose a token by the logits of batch row `row`, and remember it."""
        return int(self._api.llama_sampler_sample(self._chain, context, row))

    def free(self) -> None:
        """Give the chain's memory back."""
        chain, self._chain = self._chain, None
        if chain:
            self._api.llama_sampler_free(chain)


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
        parts.append(api.llama_sampler_init_typical(max(options.typical_p, 0.0), 1))
    if options.top_p < 1:
        parts.append(api.llama_sampler_init_top_p(max(options.top_p, 0.0), 1))
    if options.min_p > 0:
        parts.append(api.llama_sampler_init_min_p(options.min_p, 1))
    parts.append(api.llama_sampler_init_temp(options.temperature))
    parts.append(api.llama_sampler_init_dist(options.with_seed().seed & RANDOM_SEED))
    return parts
