"""When a pipeline verifies drafts, and how many: by what trips through it were seen to take. Pure; times in s."""

from __future__ import annotations

from osync.coordinator.slot import Slot
from osync.core.speculation import MOST_DRAFTS, NOTHING, DraftLength, Lookup
from osync.engine.frame import Rows

_SHARE = 0.15
_LONGER = 1.3
"""A trip whose outcome is known before the next one begins, in times between two tokens; a first guess."""
_DEARER = 0.4
"""What a row adds to a trip, in times between two tokens; a first guess."""


class Drafting:
    """Keeps an index of each slot's text while its request runs."""

    def __init__(self) -> None:
        self._plain_s = 0.0
        self._trip_s = 0.0
        self._row_s = 0.0

    def begin(self, slot: Slot) -> None:
        """A request starts, or starts again, with the slot's history."""
        slot.lookup = Lookup(slot.history)
        slot.drafts = DraftLength()
        slot.guess = NOTHING
        slot.taken_ns = 0

    def extend(self, slot: Slot, token: int) -> None:
        """Take a token."""
        if slot.lookup is not None:
            slot.lookup.extend((token,))

    def look(self, slot: Slot, room: int) -> int:
        """Guess what follows the slot's history, `room` tokens at most; return how many of it to verify."""
        if slot.lookup is None or slot.drafts is None:
            return 0
        slot.guess = slot.lookup.guess(min(room, MOST_DRAFTS))
        trip_s = self._trip_s or _LONGER * self._plain_s
        return slot.drafts.choose(slot.guess, self._plain_s, trip_s, self._row_s or _DEARER * self._plain_s)

    def landed(self, slot: Slot, rows: Rows, sampled: int, took_s: float, now_ns: int) -> None:
        """Learn from rows that gave `sampled` tokens; `took_s` from sending to their outcome."""
        drafts = rows.sample - 1
        if drafts > 0 and slot.drafts is not None:
            slot.drafts.learn(slot.guess.match, drafts, sampled - 1)
            error = took_s - (self._trip_s or _LONGER * self._plain_s) - drafts * self._row_s
            self._trip_s = max(1e-6, (self._trip_s or _LONGER * self._plain_s) + _SHARE * error)
            self._row_s = max(0.0, self._row_s + 0.3 * _SHARE * error / drafts)
        elif slot.taken_ns and slot.ahead:
            if slot.drafts is not None:
                slot.drafts.plain()
            self._plain_s = _blend(self._plain_s, (now_ns - slot.taken_ns) / 1e9)
        slot.taken_ns = now_ns

    def prompt(self, count: int, took_s: float) -> None:
        """Learn what a row adds from a frame of `count` rows of prompts alone."""
        if count >= 8 and self._plain_s and took_s > self._plain_s:
            self._row_s = _blend(self._row_s, (took_s - self._plain_s) / count)


def _blend(old: float, new: float) -> float:
    return new if not old else old + _SHARE * (min(new, 4 * old) - old)
