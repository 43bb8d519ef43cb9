"""Which rows go into the next evaluation. Pure: no loop, no clock, no llama.cpp."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from osync.coordinator.request import Request
from osync.engine.frame import Close, Frame, Open, Operation, Outcome, Rows, Truncate

CHUNK = 256
"""Where prompts are cut in deterministic mode, always at multiples."""
MIXED_CHUNK = 32
"""Rows of a prompt that join running answers at first; what they cost decides how many next time."""


@dataclass(slots=True)
class Slot:
    """A place in the stages' KV caches, and the tokens that are in it."""

    id: int
    tokens: list[int] = field(default_factory=list)
    fixed: int = 0
    """How many of them were evaluated in whole chunks: what deterministic mode may use again."""
    is_void: bool = False
    """An evaluation failed: what the stages have is unknown."""
    used: int = 0
    request: Request | None = None
    history: list[int] = field(default_factory=list)
    """The request's prompt and what was sampled so far."""

    @property
    def pending(self) -> int:
        """Tokens that are to be evaluated."""
        return len(self.history) - len(self.tokens)


class Schedule:
    """The slots of one pipeline. `admit`, then `frame`, then `apply` or `forget`, over and over."""

    def __init__(self, slots: int, n_batch: int, *, deterministic: bool = False) -> None:
        self.slots = [Slot(id=number) for number in range(slots)]
        self._n_batch = min(n_batch, CHUNK) if deterministic else n_batch
        self._deterministic = deterministic
        self._operations: list[Operation] = []
        self._turn = 0
        self.mixed_chunk = MIXED_CHUNK
        self._decode_ns = 0.0

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return sum(slot.request is not None for slot in self.slots)

    @property
    def has_room(self) -> bool:
        """True if a request can be admitted."""
        return any(slot.request is None for slot in self.slots)

    def admit(self, request: Request) -> int:
        """Give a request the free slot that knows most of its prompt; return how many tokens it keeps."""
        free = [slot for slot in self.slots if slot.request is None]
        slot = max(free, key=lambda slot: (self._common(slot, request), -len(slot.tokens), -slot.used))
        kept = self._common(slot, request)
        self._turn += 1
        slot.used = self._turn
        slot.request = request
        slot.history = list(request.prompt)
        if slot.is_void or kept < len(slot.tokens):
            slot.is_void = False
            self._operations.append(Truncate(slot.id, kept))
            del slot.tokens[kept:]
            slot.fixed = min(slot.fixed, kept)
        if request.wants_tokens:
            self._operations.append(Open(slot.id, request.options, request.options.recent(request.prompt)))
        return kept

    def release(self, request: Request) -> None:
        """Take the request's slot back; its tokens stay for a prompt that begins alike."""
        for slot in self.slots:
            if slot.request is request:
                slot.request = None
                slot.history = []
                if request.wants_tokens:
                    self._operations.append(Close(slot.id))

    def frame(self) -> Frame:
        """Return the next evaluation; an empty frame if there is nothing to do."""
        operations, self._operations = tuple(self._operations), []
        busy = sorted((slot for slot in self.slots if slot.request is not None), key=lambda slot: slot.used)
        if self._deterministic:
            rows = [self._alone(busy)] if busy else []
        else:
            rows = self._together(busy)
        return Frame(tuple(rows), operations)

    def _together(self, busy: Sequence[Slot]) -> list[Rows]:
        decoding = [slot for slot in busy if slot.pending == 1]
        rows = [_rows(slot, 1) for slot in decoding]
        room = self._n_batch - len(rows)
        if decoding:
            room = min(room, self.mixed_chunk)
        for slot in busy:
            if slot.pending > 1 and room > 0:
                count = min(slot.pending, room)
                rows.append(_rows(slot, count))
                room -= count
        return rows

    def _alone(self, busy: Sequence[Slot]) -> Rows:
        """One sequence, whose turn goes to the end of the line: a whole chunk, or one token."""
        slot = busy[0]
        self._turn += 1
        slot.used = self._turn
        done, prompt = len(slot.tokens), len(slot.request.prompt) if slot.request else 0
        if done < prompt:
            return _rows(slot, min(self._n_batch - done % self._n_batch, prompt - done))
        return _rows(slot, 1)

    def apply(self, frame: Frame, outcome: Outcome, took_ns: int, now_ns: int) -> list[Request]:
        """Take an evaluation's outcome; return the requests that ended with it."""
        if outcome.undone is not None:
            for number, length in outcome.undone.items():
                self._cut(self.slots[number], length)
            return []
        self._learn(frame, took_ns)
        ended: list[Request] = []
        for rows in frame.rows:
            slot = self.slots[rows.sequence]
            slot.tokens.extend(rows.tokens)
            request = slot.request
            prompt = len(request.prompt) if request is not None else 0
            if len(rows.tokens) == self._n_batch and slot.fixed == rows.position:
                slot.fixed = len(slot.tokens)
            if request is None or request.ended:
                continue
            if rows.position < prompt <= len(slot.tokens):
                request.prompt_done(now_ns)
            for token in outcome.sampled.get(rows.sequence, ()):
                if request.ended:
                    break
                slot.history.append(token)
                request.take(token, now_ns)
            if request.ended:
                ended.append(request)
        return ended

    def forget(self, frame: Frame) -> list[Request]:
        """An evaluation failed: its sequences' caches are void. Return the requests that had them."""
        touched = {rows.sequence for rows in frame.rows} | {
            operation.sequence for operation in frame.operations if isinstance(operation, (Open, Truncate))
        }
        hit = []
        for number in sorted(touched):
            slot = self.slots[number]
            self._cut(slot, 0)
            slot.is_void = True
            if slot.request is not None:
                hit.append(slot.request)
        return hit

    def _cut(self, slot: Slot, length: int) -> None:
        del slot.tokens[length:]
        slot.fixed = min(slot.fixed, length)

    def _common(self, slot: Slot, request: Request) -> int:
        """Return how many first tokens of the prompt the slot keeps; the last is evaluated in any case.

        Who fixes a seed wants the same answer again, so that nothing is used again that was evaluated in
        another shape: beside others, or cut elsewhere.
        """
        exact, prompt = self._deterministic or request.is_repeatable, request.prompt
        most = min(len(prompt) - 1, slot.fixed if exact else len(slot.tokens))
        common = next((i for i in range(most) if slot.tokens[i] != prompt[i]), most)
        return common // self._n_batch * self._n_batch if exact else common

    def _learn(self, frame: Frame, took_ns: int) -> None:
        """Keep a prompt's share of an evaluation so small that running answers slow down twofold at most."""
        single = all(len(rows.tokens) == 1 for rows in frame.rows)
        mixed = not single and any(len(rows.tokens) == 1 for rows in frame.rows)
        if single and frame.rows:
            self._decode_ns = took_ns if not self._decode_ns else 0.8 * self._decode_ns + 0.2 * took_ns
        elif mixed and self._decode_ns:
            if took_ns > 2 * self._decode_ns:
                self.mixed_chunk = max(4, self.mixed_chunk * 3 // 4)
            elif took_ns < 1.7 * self._decode_ns:
                self.mixed_chunk = min(self._n_batch, self.mixed_chunk + 4)


def _rows(slot: Slot, count: int) -> Rows:
    start = len(slot.tokens)
    tokens = tuple(slot.history[start : start + count])
    last = start + count == len(slot.history)
    wanted = slot.request is not None and slot.request.wants_tokens
    return Rows(slot.id, start, tokens, sample=1 if last and wanted else 0)


def rows_of(frame: Frame, slots: Iterable[int]) -> int:
    """Return how many rows of the frame belong to `slots`."""
    wanted = set(slots)
    return sum(len(rows.tokens) for rows in frame.rows if rows.sequence in wanted)
