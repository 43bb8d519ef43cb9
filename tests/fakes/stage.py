"""A stage, or a pipeline of several, that is a few lines of arithmetic, and fails on demand."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Literal

from osync.engine.frame import SAMPLED, Close, Copy, Frame, Limits, Open, Operation, Outcome, Rows, Truncate
from osync.errors import ModelError, StageLost

END = 0
Fault = Literal["fail", "undo", "lose"]
"""An evaluation raises; is undone; the pipeline breaks."""


class Letters:
    """Token 1 is "b" and so on; token 0 ends an answer."""

    def piece(self, token: int) -> bytes:
        return bytes([97 + token % 26])

    def is_end(self, token: int) -> bool:
        return token == END


def follow(history: list[int]) -> int:
    """The "model": the next token depends on all before it."""
    return (sum(history) * 7 + len(history)) % 100 + 1


def answer(prompt: list[int], count: int) -> list[int]:
    history = list(prompt)
    for _ in range(count):
        history.append(follow(history))
    return history[len(prompt) :]


class FakeStage:
    """Keeps what a stage keeps and checks that each frame fits it."""

    def __init__(
        self,
        sequences: int = 2,
        context: int = 64,
        n_batch: int = 8,
        can_cut: bool = True,
        *,
        depth: int = 1,
        kept: int = 0,
        kept_tokens: int = 0,
        faults: Mapping[int, Fault] | None = None,
        runs_ahead: bool = False,
    ) -> None:
        self.limits = Limits(
            sequences,
            context,
            n_batch,
            sequences,
            1000,
            depth=depth,
            kept=kept,
            kept_tokens=kept_tokens,
            cuts=can_cut,
            runs_ahead=runs_ahead,
        )
        self.sampled: dict[int, int | None] = {}
        self.ran_ahead = self.verified = self.accepted = 0
        self.cache: list[list[int]] = [[] for _ in range(sequences + kept)]
        self.open: set[int] = set()
        self.frames: list[Frame] = []
        self.flying = self.most_flying = self.recovered = 0
        self.faults = dict(faults or {})
        self.broken = False
        self.aborted = False
        self.fail_next: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self._turn = asyncio.Lock()

    async def evaluate(self, frame: Frame) -> Outcome:
        self.frames.append(frame)
        self.flying += 1
        self.most_flying = max(self.most_flying, self.flying)
        assert self.flying <= self.limits.depth
        try:
            if self.limits.depth == 1:
                self.aborted = False
                await asyncio.sleep(0)
                await self.gate.wait()
                return self._work(frame, len(self.frames))
            number = len(self.frames)
            # Each of the stages takes its time; asyncio.Lock is fair, so that frames stay in order.
            async with self._turn:
                await self.gate.wait()
                outcome: Outcome | Exception
                try:
                    outcome = self._work(frame, number)
                except (ModelError, StageLost) as error:
                    outcome = error
            for _ in range(self.limits.depth):
                await asyncio.sleep(0)
            if isinstance(outcome, Exception):
                raise outcome
            return outcome
        finally:
            self.flying -= 1

    def _work(self, frame: Frame, number: int) -> Outcome:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        fault = self.faults.pop(number, None)
        if fault == "lose":
            self.broken = True
        if self.broken:
            raise StageLost("a shard is gone")
        changed = frame.sequences(len(self.cache))
        if fault == "fail":
            for sequence in changed:  # nothing there can be relied on
                self.cache[sequence] = [999] * (number % 5)
            raise ModelError("broken")
        whole = True
        for operation in frame.operations:
            whole &= self._apply(operation)
        rows_of = [(rows, self._known(rows)) for rows in frame.rows]
        is_known = all(tokens for _, tokens in rows_of)
        lengths = {n: len(self.cache[n]) for n in changed if n < self.limits.sequences}
        follows = all(rows.position == lengths[rows.sequence] for rows in frame.rows)
        for rows in frame.rows:
            if rows.sample:
                self.sampled[rows.sequence] = None
        if self.aborted or fault == "undo" or not whole or not follows:
            return Outcome({}, lengths)
        if not is_known:
            return Outcome({}, dict.fromkeys(lengths, 0))
        assert sum(len(rows.tokens) for rows in frame.rows) <= self.limits.n_batch
        sampled = {}
        for rows, tokens in rows_of:
            cache = self.cache[rows.sequence]
            cache.extend(tokens)
            assert len(cache) <= self.limits.context_length
            if rows.sample:
                assert rows.sequence in self.open
                sampled[rows.sequence] = given = self._sample(cache, rows.sample)
                self.sampled[rows.sequence] = given[-1] if len(given) == rows.sample else None
                self.verified += rows.sample - 1
                self.accepted += len(given) - 1
        return Outcome(sampled)

    def _sample(self, cache: list[int], count: int) -> tuple[int, ...]:
        given: list[int] = []
        for back in range(count, 0, -1):
            given.append(self.follow(cache[: len(cache) - back + 1]))
            if back > 1 and given[-1] != cache[1 - back]:
                break
        return tuple(given)

    def follow(self, history: list[int]) -> int:
        return follow(history)

    def answer(self, prompt: list[int], count: int) -> list[int]:
        history = list(prompt)
        for _ in range(count):
            history.append(self.follow(history))
        return history[len(prompt) :]

    def _known(self, rows: Rows) -> tuple[int, ...]:
        if rows.tokens[0] != SAMPLED:
            return rows.tokens
        assert self.limits.runs_ahead
        self.ran_ahead += 1
        token = self.sampled.get(rows.sequence)
        return () if token is None else (token, *rows.tokens[1:])

    def _apply(self, operation: Operation) -> bool:
        match operation:
            case Open(sequence):
                self.open.add(sequence)
            case Close(sequence):
                self.open.discard(sequence)
            case Truncate(sequence, length):
                return self._shorten(sequence, length)
            case Copy(source, target, length) if target >= self.limits.sequences:
                self.cache[target] = list(self.cache[source]) if len(self.cache[source]) == length else []
            case Copy(source, target, length):
                self.cache[target] = list(self.cache[source])
                return self._shorten(target, length)
        return True

    def _shorten(self, sequence: int, length: int) -> bool:
        cache = self.cache[sequence]
        if length > len(cache):
            return False
        if length and length < len(cache) and not self.limits.cuts:
            cache.clear()
            return False
        del cache[length:]
        return True

    @property
    def kept_tokens(self) -> int:
        return sum(map(len, self.cache[self.limits.sequences :]))

    async def recover(self) -> None:
        assert self.flying == 0
        self.broken = False
        self.recovered += 1
        self.open.clear()
        for cache in self.cache:
            cache.clear()

    def abort(self) -> None:
        self.aborted = self.limits.depth == 1
        self.gate.set()

    async def close(self) -> None:
        pass
