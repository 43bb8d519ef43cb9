"""A place in the stages' KV caches, and how much of it a prompt can use again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from osync.coordinator.request import Request
from osync.core.speculation import NOTHING, DraftLength, Guess, Lookup


@dataclass(slots=True, eq=False)
class Slot:
    """One sequence of the stages. What is in flight counts as done: it is undone where it fails."""

    id: int
    tokens: list[int] = field(default_factory=list)
    """What its KV cache holds after all frames in flight."""
    fixed: int = 0
    """How many of them were evaluated in whole chunks: what exactly repeatable requests may use again."""
    is_void: bool = False
    """An evaluation failed: what the stages have is unknown."""
    epoch: int = 0
    """Counts what made outcomes of frames before it meaningless: a new request, an undone evaluation."""
    used: int = 0
    request: Request | None = None
    history: list[int] = field(default_factory=list)
    """The request's prompt and what was sampled so far."""
    ahead: int = 0
    """Tokens that frames in flight sample, where their successors may be sent before they are known."""
    sent: int = 0
    """Number of the frame that had its last rows."""
    lookup: Lookup | None = None
    """Where drafts come from; None where none are made."""
    drafts: DraftLength | None = None
    guess: Guess = NOTHING
    """What is being verified, or is to be next."""
    waits: bool = False
    """No token is sent ahead: the next ones are drafts."""
    taken_ns: int = 0
    """When its last token came."""

    @property
    def pending(self) -> int:
        """Tokens that are to be evaluated; none while the next one is being sampled, unless it counts as `ahead`."""
        return len(self.history) + self.ahead - len(self.tokens)

    def cut(self, length: int) -> None:
        """Keep only the first tokens; what is in flight is void."""
        del self.tokens[length:]
        self.fixed = min(self.fixed, length)
        self.ahead = 0


def common_length(a: Sequence[int], b: Sequence[int], most: int) -> int:
    """Return how many of the first `most` tokens are the same; slices compare a hundred times faster than a loop."""
    low, high = 0, min(most, len(a), len(b))
    if tuple(a[:high]) == tuple(b[:high]):
        return high
    while high - low > 1:
        middle = (low + high) // 2
        if tuple(a[low:middle]) == tuple(b[low:middle]):
            low = middle
        else:
            high = middle
    return low
