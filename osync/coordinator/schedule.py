"""Which rows go into the next evaluation. Pure: no loop, no clock, no llama.cpp.

Several frames may be in flight. Their outcomes come in order, and a frame whose rows do not follow on what
a stage has is undone by it; so is, then, whatever was sent after an evaluation that came to nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import replace

from osync.coordinator.drafting import Drafting
from osync.coordinator.kept import Kept
from osync.coordinator.pace import Pace
from osync.coordinator.request import Request
from osync.coordinator.slot import Slot, common_length
from osync.core.speculation import MOST_DRAFTS
from osync.engine.frame import SAMPLED, Close, Copy, Frame, Limits, Open, Operation, Outcome, Rows, Truncate

CHUNK = 256
"""Where prompts are cut in deterministic mode, always at multiples."""
PIPELINED_CHUNK = 64
"""Where prompts are cut for a pipeline: 768 tokens in 12 parts keep 4 stages busy 80 % of the time."""
_MOST_AHEAD = 2
"""Tokens of a sequence that are on their way: one through the stages, and the next waiting for it at the first."""
_WORTH_KEEPING = 64
"""Tokens of a prefix below which evaluating them again is as cheap as keeping them."""
_WORTH_COPYING = 16
"""More tokens than are there already, for which another sequence's are copied."""


class Schedule:
    """The slots of one pipeline. `admit`, then `frame`, then `apply` or `forget`, over and over."""

    def __init__(self, limits: Limits, *, deterministic: bool = False, drafts: bool = True) -> None:
        self.slots = [Slot(id=number) for number in range(limits.sequences)]
        self.kept = Kept(range(limits.sequences, limits.sequences + limits.kept), limits.kept_tokens, cuts=limits.cuts)
        self._limits = limits
        self._chunk = CHUNK if deterministic else limits.n_batch if limits.depth == 1 else PIPELINED_CHUNK
        self._chunk = min(self._chunk, limits.n_batch)
        self._deterministic = deterministic
        self._operations: list[Operation] = []
        self._flying: deque[tuple[Frame, dict[int, int]]] = deque()
        self._turn = 0
        self._sent = 0
        self._landed_ns = 0
        self._groups = limits.depth // 2 if limits.runs_ahead else limits.depth
        self._pace = Pace()
        self._drafting = Drafting() if drafts and limits.runs_ahead and not deterministic else None

    @property
    def active(self) -> int:
        """Requests that have a slot."""
        return sum(slot.request is not None for slot in self.slots)

    @property
    def has_room(self) -> bool:
        """True if a request can be admitted."""
        return any(slot.request is None for slot in self.slots)

    def admit(self, request: Request) -> int:
        """Give a request a free slot with as much of its prompt as any sequence has; return how many tokens."""
        self._turn += 1
        idle = [slot for slot in self.slots if slot.request is None]
        slot = max(idle, key=lambda slot: (self._common(slot, request), not slot.tokens, -slot.used))
        common = self._common(slot, request)
        source, most = self._elsewhere(request)
        if source is not None and most >= common + _WORTH_COPYING:
            slot = min(idle, key=lambda slot: (bool(slot.tokens), slot.used))
            self._make_way(slot, 0, spare=source[0])
            self._operations.append(Copy(source[0], slot.id, most))
            slot.tokens, slot.fixed = list(request.prompt[:most]), min(source[1], most)
            common = most
        else:
            self._make_way(slot, common)
        slot.is_void = False
        slot.epoch += 1
        slot.used = self._turn
        slot.request = request
        slot.history = list(request.prompt)
        slot.waits = False
        if self._drafting is not None and request.wants_tokens:
            self._drafting.begin(slot)
        self._open(slot)
        if self.kept.is_on and not self._deterministic:
            # Cells in use cost every running answer time, whosoever they are: 20 % at 6,000 in a small model.
            for other in idle:
                if other is not slot and self.kept.has_room(len(other.tokens)):
                    self._make_way(other, 0)
        return common

    def release(self, request: Request) -> None:
        """Take the request's slot back; its tokens stay for a prompt that begins alike."""
        for slot in self.slots:
            if slot.request is request:
                if slot.ahead:
                    # Frames in flight add tokens that nobody hears of any more.
                    known = len(slot.history)
                    is_longer = len(slot.tokens) > known
                    slot.cut(known)
                    slot.epoch += 1
                    if is_longer:
                        self._operations.append(Truncate(slot.id, len(slot.tokens)))
                slot.request = None
                slot.history = []
                slot.lookup = None
                if request.wants_tokens:
                    self._operations.append(Close(slot.id))

    def frame(self) -> Frame | None:
        """Return the next evaluation, which is in flight then; None if there is nothing to do now."""
        busy = sorted([slot for slot in self.slots if slot.request is not None], key=lambda slot: slot.used)
        if self._deterministic:
            rows = self._alone(busy)
        else:
            rows = self._together(busy)
        if not rows and not self._operations:
            return None
        frame = Frame(tuple(rows), tuple(self._operations))
        sequences = frame.sequences(len(self.slots)) if self._operations else [run.sequence for run in rows]
        epochs = {number: self.slots[number].epoch for number in sequences}
        self._operations.clear()
        self._flying.append((frame, epochs))
        self._sent += 1
        for run in rows:
            self.slots[run.sequence].sent = self._sent
        return frame

    def apply(self, frame: Frame, outcome: Outcome, took_ns: int, now_ns: int) -> list[Request]:
        """Take the outcome of the oldest frame in flight; return the requests that ended with it."""
        epochs = self._landed(frame)
        if outcome.undone is not None:
            self._lose_kept(frame)
            for number, length in outcome.undone.items():
                slot = self.slots[number]
                if epochs.get(number) == slot.epoch:
                    self._rewind(slot, length)
            return []
        self._pace.learn(frame, self._stage_ns(took_ns, now_ns))
        if self._drafting is not None and all(not rows.sample for rows in frame.rows):
            self._drafting.prompt(sum(len(rows.tokens) for rows in frame.rows), took_ns / 1e9)
        ended: list[Request] = []
        for rows in frame.rows:
            slot = self.slots[rows.sequence]
            request = slot.request
            if request is None or request.ended or epochs[rows.sequence] != slot.epoch:
                continue
            if rows.position < len(request.prompt) <= rows.position + len(rows.tokens):
                request.prompt_done(now_ns)
            if rows.sample:
                self._take(slot, rows, outcome.sampled.get(rows.sequence, ()), took_ns, now_ns)
            if request.ended:
                ended.append(request)
        return ended

    def _take(self, slot: Slot, rows: Rows, sampled: Sequence[int], took_ns: int, now_ns: int) -> None:
        """Add the tokens that rows gave to their slot, and hand them to its request until it has ended."""
        request, drafting = slot.request, self._drafting
        assert request is not None
        if drafting is not None:
            drafting.landed(slot, rows, len(sampled), took_ns / 1e9, now_ns)
        if len(sampled) < rows.sample:
            # The drafts from the first wrong one on.
            slot.cut(rows.position + len(rows.tokens) - rows.sample + len(sampled))
            self._operations.append(Truncate(slot.id, len(slot.tokens)))
        elif slot.ahead:
            slot.ahead -= 1
        for token in sampled:
            if request.ended:
                return
            known = len(slot.history)
            if known < len(slot.tokens):
                slot.tokens[known] = token
            slot.history.append(token)
            if drafting is not None:
                drafting.extend(slot, token)
            request.take(token, now_ns)
        if drafting is not None and not request.ended:
            slot.waits = self._may_draft() and drafting.look(slot, self._room(slot)) > 0

    def forget(self, frame: Frame) -> list[Request]:
        """The oldest frame in flight failed: its sequences' caches are void. Return the requests to fail.

        Whoever got such a sequence after that frame was sent starts again.
        """
        epochs = self._landed(frame)
        self._lose_kept(frame)
        hit = []
        for number in sorted(epochs):
            slot = self.slots[number]
            is_mine = epochs[number] == slot.epoch
            slot.cut(0)
            slot.is_void = True
            slot.epoch += 1
            if slot.request is None:
                continue
            if is_mine:
                hit.append(slot.request)
            else:
                self._operations.append(Truncate(slot.id, 0))
                self._open(slot)
        return hit

    def restart(self) -> None:
        """The stages are new and empty: nothing is in flight, and all requests start from their histories."""
        self._flying.clear()
        self._operations.clear()
        self.kept.clear()
        for slot in self.slots:
            slot.cut(0)
            slot.is_void = False
            slot.epoch += 1
            if slot.request is not None:
                self._open(slot)

    def _together(self, busy: Sequence[Slot]) -> list[Rows]:
        running = sum(slot.pending <= 1 for slot in busy)
        decoding = [slot for slot in busy if slot.pending == 1 and self._may_run(slot)]
        prompts = [slot for slot in busy if slot.pending > 1]
        if self._limits.depth > 1 and decoding:
            if prompts:
                # Rows of prompts go through the stages that are idle while a token makes its way.
                decoding = [s for s in decoding if not s.ahead or self._sent - s.sent >= self._groups - 1]
            # As many groups as stages: each has one.
            decoding = decoding[: -(-running // self._groups)]
            for slot in decoding:
                self._turn += 1
                slot.used = self._turn
        rows = [self._next_rows(slot) for slot in decoding]
        if not prompts:
            return rows
        room = min(self._limits.n_batch - len(rows), self._chunk)
        if running:
            room = self._pace.chunk(room, len(rows)) if room > 0 else 0
        # Half for who came first, the rest for who is through soonest: a long prompt holds up nobody for long.
        oldest = min(prompts, key=_used)
        shares = {oldest.id: min(oldest.pending, -(-room // 2))} if room > 0 else {}
        room -= sum(shares.values())
        for slot in sorted(prompts, key=_pending):
            more = min(slot.pending - shares.get(slot.id, 0), room)
            if more > 0:
                shares[slot.id] = shares.get(slot.id, 0) + more
                room -= more
        rows.extend(self._rows(self.slots[number], count) for number, count in shares.items())
        return rows

    def _may_run(self, slot: Slot) -> bool:
        """Tell whether a slot's next row may go now: its token is known, or the stages put it in."""
        if not slot.ahead:
            return True
        request = slot.request
        return slot.ahead < _MOST_AHEAD and not slot.waits and request is not None and request.may_follow(slot.ahead)

    def _may_draft(self) -> bool:
        """Rows of drafts cost what other sequences' rows do: only where stages would be idle."""
        return self.active < max(2, self._groups)

    def _room(self, slot: Slot) -> int:
        """Return how many tokens may be sent after the slot's next one."""
        request = slot.request
        most = self._limits.context_length - len(slot.history) - slot.ahead
        while most > 0 and request is not None and not request.may_follow(slot.ahead + most):
            most = min(most - 1, MOST_DRAFTS)
        return max(0, most)

    def _next_rows(self, slot: Slot) -> Rows:
        """Return the slot's next row, with drafts behind it where they pay."""
        if self._drafting is None or slot.ahead or not self._may_draft():
            return self._rows(slot, 1)
        count = self._drafting.look(slot, self._room(slot))
        rows = self._rows(slot, 1)
        if not count or not rows.sample:
            return rows
        drafts = slot.guess.tokens[:count]
        slot.ahead = 0
        slot.tokens.extend(drafts)
        return replace(rows, tokens=rows.tokens + drafts, sample=1 + count)

    def _alone(self, busy: Sequence[Slot]) -> list[Rows]:
        """One sequence, whose turn goes to the end of the line: a whole chunk, or one token."""
        slot = next((slot for slot in busy if slot.pending > 0 and self._may_run(slot)), None)
        if slot is None:
            return []
        self._turn += 1
        slot.used = self._turn
        done, prompt = len(slot.tokens), len(slot.request.prompt) if slot.request else 0
        return [self._rows(slot, min(self._chunk - done % self._chunk, prompt - done) if done < prompt else 1)]

    def _rows(self, slot: Slot, count: int) -> Rows:
        start = len(slot.tokens)
        tokens = [SAMPLED] if slot.ahead else slot.history[start : start + count]
        is_last = start + count == len(slot.history) + slot.ahead
        sample = 1 if is_last and slot.request is not None and slot.request.wants_tokens else 0
        slot.tokens.extend(tokens)
        if count == self._chunk and slot.fixed == start:
            slot.fixed = start + count
        if sample and self._limits.runs_ahead:
            slot.ahead += 1
        return Rows(slot.id, start, tuple(tokens), sample)

    def _stage_ns(self, took_ns: int, now_ns: int) -> int:
        """Return about how long a frame was at one stage: in a full pipeline they land one after the other."""
        if self._limits.depth == 1:
            return took_ns
        since_ns, self._landed_ns = now_ns - self._landed_ns, now_ns
        return min(took_ns // self._groups, since_ns) if len(self._flying) < self._groups else min(took_ns, since_ns)

    def _open(self, slot: Slot) -> None:
        request = slot.request
        if request is not None and request.wants_tokens:
            drawn = len(slot.history) - len(request.prompt)
            self._operations.append(Open(slot.id, request.options, request.options.recent(slot.history), drawn))

    def _landed(self, frame: Frame) -> dict[int, int]:
        flown, epochs = self._flying.popleft()
        if flown is not frame:
            raise ValueError("outcomes come in the order of their frames")
        return epochs

    def _rewind(self, slot: Slot, length: int) -> None:
        """The stages have no more than `length` tokens of it; and after the truncation all have as many."""
        slot.epoch += 1
        slot.cut(length)
        self._operations.append(Truncate(slot.id, len(slot.tokens)))

    def _lose_kept(self, frame: Frame) -> None:
        """Nobody knows whether what a failed frame was to keep, or did not find, is there."""
        for operation in frame.operations:
            if isinstance(operation, Copy):
                self.kept.discard(operation.source)
                self.kept.discard(operation.target)

    def _make_way(self, slot: Slot, length: int, spare: int | None = None) -> None:
        """Cut a slot, and keep what it had for who needs it next."""
        if len(slot.tokens) - length >= _WORTH_KEEPING and self.kept.is_on:
            place, gone = self.kept.put(slot.tokens, slot.fixed, slot.used, spare)
            self._operations.extend(Truncate(lost, 0) for lost in gone)
            if place is not None:
                self._operations.append(Copy(slot.id, place, len(slot.tokens)))
        if slot.is_void or length < len(slot.tokens):
            slot.is_void = False
            slot.epoch += 1
            slot.cut(length)
            self._operations.append(Truncate(slot.id, length))

    def _elsewhere(self, request: Request) -> tuple[tuple[int, int] | None, int]:
        """Return (id, its fixed tokens) of the busy sequence or kept prefix with most of the prompt, and how much."""
        best: tuple[int, int] | None = None
        most = 0
        for slot in self.slots:
            if slot.request is not None and (common := self._common(slot, request)) > most:
                best, most = (slot.id, slot.fixed), common
        if not self.kept.is_on:
            return best, most
        found = None
        for prefix in self.kept:
            common = self._usable(prefix.tokens, prefix.fixed, request)
            if common > most:
                best, most, found = (prefix.place, prefix.fixed), common, prefix
        if found is not None:
            found.used = self._turn
        return best, most

    def _common(self, slot: Slot, request: Request) -> int:
        return self._usable(slot.tokens, slot.fixed, request)

    def _usable(self, tokens: Sequence[int], fixed: int, request: Request) -> int:
        """Return how many first tokens of the prompt can be used again; the last is evaluated in any case.

        Who fixes a seed wants the same answer again, so that nothing is used again that was evaluated in
        another shape: beside others, or cut elsewhere.
        """
        exact, prompt = self._deterministic or request.is_repeatable, request.prompt
        common = common_length(tokens, prompt, min(len(prompt) - 1, fixed if exact else len(tokens)))
        if exact:
            common = common // self._chunk * self._chunk
        if common < len(tokens) and not self._limits.cuts:
            return 0
        return common


def _used(slot: Slot) -> int:
    return slot.used


def _pending(slot: Slot) -> int:
    return slot.pending


def rows_of(frame: Frame, slots: Iterable[int]) -> int:
    """Return how many rows of the frame belong to `slots`."""
    wanted = set(slots)
    return sum(len(rows.tokens) for rows in frame.rows if rows.sequence in wanted)
