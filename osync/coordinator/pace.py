"""How many rows of prompts may join running answers. Pure."""

from __future__ import annotations

from osync.engine.frame import Frame

FIRST_CHUNK = 8
"""Rows of prompts beside running answers while nobody knows what a row costs."""
_SLOWER = 0.65
"""An evaluation's time may grow by so much with a prompt's rows: below twofold, with room for noise."""
_SMALL = 1.5
"""A row costs so much more in a small evaluation than in a prompt's large one; seen: 1.1 to 1.6."""
_LOOK_AGAIN = 12
"""Evaluations with rows of prompts, after which one goes without."""


class Pace:
    """Learns what an evaluation costs without prompts, and what each row of a prompt adds."""

    def __init__(self) -> None:
        self._decode_ns = 0.0
        self._row_ns = 0.0
        self._mixed = 0
        """Evaluations with both since the last of running answers alone."""
        self._knows_mixed = False

    def chunk(self, most: int, decoding: int) -> int:
        """Return how many rows of prompts may join `decoding` rows of running answers.

        As many as these are double the time at worst. Now and then none may: the host may have become
        slower, or faster, since an evaluation without them was last seen.
        """
        if decoding and self._mixed >= _LOOK_AGAIN:
            return 0
        if not self._decode_ns or not self._row_ns:
            return min(most, max(FIRST_CHUNK, decoding))
        return min(most, max(1, decoding, int(_SLOWER * self._decode_ns / self._row_ns)))

    def learn(self, frame: Frame, took_ns: int) -> None:
        """Note how long an evaluation took."""
        count = sum([len(rows.tokens) for rows in frame.rows])
        singles = sum([len(rows.tokens) == 1 for rows in frame.rows])
        if not count:
            return
        if singles == count:
            # After a change of load what was seen before counts less.
            self._decode_ns = _blend(self._decode_ns, took_ns, 0.5 if self._mixed else 0.2)
            self._mixed = 0
        elif not singles:
            if count >= FIRST_CHUNK and not self._knows_mixed:
                self._row_ns = _blend(self._row_ns, _SMALL * took_ns / count, 0.5)
        elif self._decode_ns:
            self._mixed += 1
            self._knows_mixed = True
            self._row_ns = _blend(self._row_ns, (took_ns - self._decode_ns) / (count - singles), 0.3)


def _blend(old: float, new: float, share: float) -> float:
    """Move towards `new`; one evaluation that was disturbed, or lucky, does not turn everything over."""
    if not old:
        return max(new, 1.0)
    return (1 - share) * old + share * min(max(new, old / 4), 4 * old)
