"""Credit of one direction of one exchange: pure counting, both ends agree on it without asking."""

from __future__ import annotations

from osync.errors import StreamBroken
from osync.net.exchange import WINDOW_BYTES


class ReceiveCredit:
    """What the other side may still send, and when to grant it more."""

    __slots__ = ("_left", "_owed", "_window")

    def __init__(self, window: int = WINDOW_BYTES) -> None:
        self._window = window
        self._left = window
        self._owed = 0

    def arrived(self, size: int) -> None:
        """Count bytes that came in. Raises StreamBroken if they were not granted."""
        if size > self._left:
            raise StreamBroken(f"the other side sent {size} bytes and was granted {self._left}")
        self._left -= size

    def consumed(self, size: int) -> int:
        """Count bytes that the reader took; return what to grant now: half a window at a time, or 0."""
        self._owed += size
        if self._owed * 2 < self._window:
            return 0
        grant, self._owed = self._owed, 0
        self._left += grant
        return grant


class SendCredit:
    """What may still be sent; never more than a window, whatever the other side grants."""

    __slots__ = ("_window", "left")

    def __init__(self, window: int = WINDOW_BYTES) -> None:
        self._window = window
        self.left = window

    def grant(self, size: int) -> None:
        """Add what the other side granted."""
        self.left = min(self.left + size, self._window)

    def take(self, wanted: int) -> int:
        """Use up as much of `wanted` as there is credit for, and return it."""
        size = min(wanted, self.left)
        self.left -= size
        return size
