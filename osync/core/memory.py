"""How much memory models may take."""

from __future__ import annotations

from osync.config import parse_memory


def budget(text: str, available: int) -> int:
    """Return the bytes that models may take of those available: `80%`, `12GiB`, or a number of bytes.

    Never more than is available. Raises ConfigError where the text is no amount of memory.
    """
    amount, share = parse_memory(text)
    free = max(0, available)
    return min(free, amount + int(free * share))
