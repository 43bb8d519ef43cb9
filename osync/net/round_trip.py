"""How long a message takes to a peer and back, from pings that are counted. No I/O: times are given."""

from __future__ import annotations

from collections import deque
from typing import Final

SAMPLES: Final = 8


class RoundTrip:
    """The least of the last measurements: what a busy loop or a full wire adds is not the distance."""

    def __init__(self) -> None:
        self.due = 0
        """Number of the ping that is to go out now; 0: none."""
        self._number = 0
        self._sent_at: float | None = None
        self._samples: deque[float] = deque(maxlen=SAMPLES)

    @property
    def seconds(self) -> float:
        """Time there and back; 0.0 where unknown."""
        return min(self._samples, default=0.0)

    def reset(self) -> None:
        """Forget what is under way: the connection is another one. Numbers go on."""
        self.due, self._sent_at = 0, None

    def ask(self) -> None:
        """Make the next ping due; an answer to the one before no longer counts."""
        self._number += 1
        self.due, self._sent_at = self._number, None

    def sent(self, now: float) -> None:
        """Take note that the due ping goes out."""
        self.due, self._sent_at = 0, now

    def returned(self, number: int, now: float) -> None:
        """Take an answer; old ones and unasked ones are nothing."""
        if number == self._number and self._sent_at is not None:
            self._samples.append(max(0.0, now - self._sent_at))
            self._sent_at = None
