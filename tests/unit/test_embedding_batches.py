"""The embedder: which texts share an evaluation, in what order, and what happens to those that leave."""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import AsyncIterator, Sequence

import pytest

from osync.coordinator.embedding import Embedder
from osync.engine.embedding import EmbeddingLimits, Vector, is_encoder, normalized
from osync.errors import BadRequest, CapacityError, ModelError

BEGIN, END = 1, 2


class Letters:
    """A token is a character, between a begin and an end."""

    def tokenize(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        body = [ord(c) for c in text]
        return [BEGIN, *body, END] if add_special and text != "nothing" else body if text != "nothing" else []


class FakeStage:
    """A sequence's vector is its number of tokens and its first two characters."""

    def __init__(self, context_length: int = 16, sequences: int = 4, n_batch: int = 16) -> None:
        self.limits = EmbeddingLimits(context_length, sequences, n_batch, 1 << 21)
        self.batches: list[list[list[int]]] = []
        self.go = asyncio.Event()
        self.go.set()
        self.started = asyncio.Event()
        self.aborted = False
        self.aborts = 0
        self.error: Exception | None = None

    async def evaluate(self, sequences: Sequence[Sequence[int]]) -> list[Vector] | None:
        self.batches.append([list(s) for s in sequences])
        self.started.set()
        await self.go.wait()
        if self.error is not None:
            raise self.error
        if self.aborted:
            self.aborted = False
            return None
        return [array("f", [len(s), *s[1:3]]) for s in sequences]

    def abort(self) -> None:
        self.aborted = True
        self.aborts += 1
        self.go.set()

    async def close(self) -> None:
        self.go.set()


@pytest.fixture
def stage() -> FakeStage:
    return FakeStage()


@pytest.fixture
async def embedder(stage: FakeStage) -> AsyncIterator[Embedder]:
    made = Embedder(stage, Letters(), max_queue=3)
    yield made
    stage.go.set()
    await made.close()


def texts_of(stage: FakeStage) -> list[list[str]]:
    return [["".join(map(chr, s[1:-1])) for s in batch] for batch in stage.batches]


async def test_order_is_kept_and_evaluations_are_shared(stage: FakeStage, embedder: Embedder):
    texts = [chr(97 + n) * (n % 5 + 1) for n in range(11)]
    found = await embedder.embed(texts)
    assert [int(v[1]) for v in found.vectors] == [ord(t[0]) for t in texts]
    assert found.tokens == sum(len(t) + 2 for t in texts)
    assert sum(map(len, stage.batches)) == len(texts) > len(stage.batches)
    for batch in stage.batches:
        assert len(batch) <= 4
        assert sum(map(len, batch)) <= 16


async def test_requests_get_places_in_turn(stage: FakeStage, embedder: Embedder):
    stage.go.clear()
    asks = [asyncio.ensure_future(embedder.embed([c * 2] * 12)) for c in "abc"]
    await stage.started.wait()
    while len(embedder._waiting) < 3:
        await asyncio.sleep(0)
    stage.go.set()
    await asyncio.gather(*asks)
    first_b = next(i for i, batch in enumerate(texts_of(stage)) if "bb" in batch)
    last_a = max(i for i, batch in enumerate(texts_of(stage)) if "aa" in batch)
    assert first_b <= 1 < last_a


async def test_a_long_text_is_cut_and_keeps_its_end(stage: FakeStage, embedder: Embedder):
    found = await embedder.embed(["x" * 40, "y" * 14])
    assert found.tokens == 32
    assert stage.batches == [[[BEGIN, *[ord("x")] * 14, END]], [[BEGIN, *[ord("y")] * 14, END]]]
    with pytest.raises(BadRequest, match=r"^the input length exceeds the context length$"):
        await embedder.embed(["short", "x" * 15], truncate=False)
    assert len(stage.batches) == 2


async def test_a_long_text_goes_beside_the_loop(stage: FakeStage, embedder: Embedder):
    assert (await embedder.embed(["x" * 40_000])).tokens == 16


async def test_no_texts_and_no_tokens(stage: FakeStage, embedder: Embedder):
    assert (await embedder.embed([])).vectors == ()
    assert (await embedder.embed([""])).tokens == 2
    with pytest.raises(BadRequest, match="empty"):
        await embedder.embed(["a", "nothing"])
    assert stage.batches == [[[BEGIN, END]]]


async def test_the_queue_is_bounded(stage: FakeStage, embedder: Embedder):
    stage.go.clear()
    asks = [asyncio.ensure_future(embedder.embed(["a"])) for _ in range(3)]
    await stage.started.wait()
    with pytest.raises(CapacityError, match="server busy"):
        await embedder.embed(["b"])
    stage.go.set()
    await asyncio.gather(*asks)
    assert (await embedder.embed(["b"])).tokens == 3


async def test_who_leaves_stops_the_evaluation_and_is_not_evaluated_further(stage: FakeStage, embedder: Embedder):
    stage.go.clear()
    ask = asyncio.ensure_future(embedder.embed(["aa"] * 50))
    await stage.started.wait()
    ask.cancel()
    with pytest.raises(asyncio.CancelledError):
        await ask
    assert stage.aborts == 1
    assert (await embedder.embed(["b"])).tokens == 3
    assert len(stage.batches) == 2


async def test_an_evaluation_goes_on_while_another_waits_for_it(stage: FakeStage, embedder: Embedder):
    stage.go.clear()
    first = asyncio.ensure_future(embedder.embed(["a"]))
    await stage.started.wait()
    both = [asyncio.ensure_future(embedder.embed([c])) for c in "bc"]
    stage.started.clear()
    stage.go.set()
    await first
    stage.go.clear()
    await stage.started.wait()
    both[0].cancel()
    await asyncio.gather(both[0], return_exceptions=True)
    assert not stage.aborts
    stage.go.set()
    assert int((await both[1]).vectors[0][1]) == ord("c")


async def test_a_failure_is_told_and_the_next_request_is_served(stage: FakeStage, embedder: Embedder):
    stage.error = RuntimeError("boom")
    with pytest.raises(ModelError, match="boom"):
        await embedder.embed(["a"] * 9)
    stage.error = BadRequest("no such token")
    with pytest.raises(BadRequest, match="no such token"):
        await embedder.embed(["a"])
    stage.error = None
    assert (await embedder.embed(["b"])).tokens == 3
    assert len(stage.batches) == 3


async def test_closing_fails_who_waits(stage: FakeStage):
    embedder = Embedder(stage, Letters())
    stage.go.clear()
    ask = asyncio.ensure_future(embedder.embed(["a"]))
    await stage.started.wait()
    await embedder.close()
    with pytest.raises(ModelError, match="unloaded"):
        await ask
    with pytest.raises(ModelError, match="unloaded"):
        await embedder.embed(["a"])


def test_normalized():
    assert list(normalized([3, 4])) == pytest.approx([0.6, 0.8])
    assert list(normalized([0, 0])) == [0, 0]
    with pytest.raises(ModelError, match="no numbers"):
        normalized([1, float("nan")])
    with pytest.raises(ModelError, match="no numbers"):
        normalized([float("inf")])


@pytest.mark.parametrize(
    ("architecture", "expected"),
    [("bert", True), ("nomic-bert-moe", True), ("gemma-embedding", True), ("llama", False), ("qwen3", False)],
)
def test_encoders(architecture: str, expected: bool):
    assert is_encoder(architecture) is expected
