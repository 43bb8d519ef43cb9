"""Every sampling option that Ollama takes, through the parser and llama.cpp's own samplers, on made-up logits."""

from __future__ import annotations

import ctypes
import importlib.util
import itertools
from typing import Any

import orjson
import pytest

from osync.engine import llama
from osync.engine.sampling import Sampler, SamplingOptions
from osync.wire.options import parse_options

if importlib.util.find_spec("llama_cpp") is None:
    pytest.skip("needs llama.cpp", allow_module_level=True)

pytestmark = pytest.mark.engine

SIZE = 1000
SPREAD = 37
HISTORY = (5, 5, 5, 7)
EXTREMES = ("1e308", "-1e308", "-1", "0", "-0.0", "1e-30", "1e-45", "1", "2")
FLOATS = (
    "top_p", "min_p", "typical_p", "temperature", "repeat_penalty", "presence_penalty", "frequency_penalty",
)  # fmt: skip


def logit(token: int) -> float:
    return (token % SPREAD) - SPREAD / 2


BEST = {token for token in range(SIZE) if token % SPREAD == SPREAD - 1}


class MadeUp:
    """llama.cpp's API, but that every row of logits is the same one."""

    def __getattr__(self, name: str) -> Any:
        return getattr(llama.library(), name)

    def llama_get_logits_ith(self, context: Any, row: int) -> Any:
        self.logits = (ctypes.c_float * SIZE)(*map(logit, range(SIZE)))
        return ctypes.cast(self.logits, ctypes.POINTER(ctypes.c_float))

    def llama_sampler_sample(self, chain: Any, context: Any, row: int) -> int:
        data = (self.llama_token_data * SIZE)(*(self.llama_token_data(t, logit(t), 0.0) for t in range(SIZE)))
        candidates = self.llama_token_data_array(data=data, size=SIZE, selected=-1, sorted=False)
        self.llama_sampler_apply(chain, ctypes.byref(candidates))
        assert 0 <= candidates.selected < candidates.size
        chosen = candidates.data[candidates.selected]
        assert chosen.logit == chosen.logit, "not a number"
        self.llama_sampler_accept(chain, chosen.id)
        return int(chosen.id)


def choose(options: str) -> int:
    """Return the token that a request with these options (JSON) gets."""
    given: dict[str, Any] = parse_options(orjson.loads(options)).sampling
    sampler = Sampler(
        MadeUp(), SamplingOptions(**{"seed": 1, **given}), vocabulary_size=SIZE, context_length=256, history=HISTORY
    )
    try:
        return sampler.sample(None, 0)
    finally:
        sampler.free()


@pytest.mark.parametrize("name", FLOATS)
def test_any_number_gives_a_likely_token(name: str):
    for value in EXTREMES:
        token = choose(f'{{"{name}":{value}}}')
        promoted = name in {"repeat_penalty", "presence_penalty", "frequency_penalty"} and value.startswith("-1")
        assert 0 <= token < SIZE
        if not promoted and name not in {"temperature", "typical_p"}:
            assert logit(token) > SPREAD / 2 - 8, (name, value)


@pytest.mark.parametrize("value", ["0", "-0.0", "-1", "-1e308", "1e-45", "1e-30"])
def test_a_temperature_of_next_to_nothing_is_greedy(value: str):
    assert choose(f'{{"temperature":{value}}}') in BEST


@pytest.mark.parametrize("value", ["0", "-1", "-1e308", "1"])
def test_a_repeat_penalty_that_cannot_divide_is_none(value: str):
    assert choose(f'{{"repeat_penalty":{value},"temperature":0}}') == min(BEST)


@pytest.mark.parametrize("name", ["presence_penalty", "frequency_penalty"])
def test_a_penalty_below_all_numbers_wants_what_was_there(name: str):
    assert choose(f'{{"{name}":-1e308}}') in HISTORY


def test_a_penalty_over_all_numbers_shuns_what_was_there():
    history = {"repeat_penalty": 1e308, "presence_penalty": 1e308, "frequency_penalty": 1e308, "temperature": 1e308}
    assert choose(orjson.dumps({**history, "top_k": 0, "top_p": 1}).decode()) not in HISTORY


def test_all_extremes_at_once():
    for high, low in itertools.product(("1e308", "-1e308", "1e-45", "0"), repeat=2):
        values = [f'"{name}":{value}' for name, value in zip(FLOATS, itertools.cycle((high, low)), strict=False)]
        assert 0 <= choose("{" + ",".join(values) + ',"top_k":0}') < SIZE


@pytest.mark.parametrize("name", ["top_k", "repeat_last_n", "seed", "num_keep", "num_predict"])
def test_any_integer_gives_a_likely_token(name: str):
    for value in ("99999999999", "-99999999999", "1e308", "-1e308", "-1", "0", "3.9"):
        assert logit(choose(f'{{"repeat_penalty":1.1,"{name}":{value}}}')) > SPREAD / 2 - 8
