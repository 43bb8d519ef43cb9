"""Prefixes of ended answers that stages keep aside: which, where, and which goes first. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from osync.coordinator.slot import common_length


@dataclass(slots=True, eq=False)
class Prefix:
    """Tokens whose KV cache is at `place`."""

    place: int
    tokens: tuple[int, ...]
    fixed: int
    used: int


class Kept:
    """At most so many prefixes, with at most so many tokens together; the least recently used goes first."""

    def __init__(self, places: range, budget: int, *, cuts: bool = True) -> None:
        """`cuts`: a longer prefix serves who needs a shorter one, too."""
        self._cuts = cuts
        self._free = list(reversed(places))
        self._budget = budget
        self._prefixes: dict[int, Prefix] = {}

    def __iter__(self) -> Iterator[Prefix]:
        return iter(self._prefixes.values())

    @property
    def tokens(self) -> int:
        """How many are kept."""
        return sum(len(prefix.tokens) for prefix in self)

    @property
    def is_on(self) -> bool:
        """False where the stages keep nothing."""
        return self._budget > 0

    def has_room(self, count: int) -> bool:
        """True if so many tokens can be kept and nothing must go for them."""
        return bool(self._free) and self.tokens + count <= self._budget

    def put(
        self, tokens: Sequence[int], fixed: int, used: int, spare: int | None = None
    ) -> tuple[int | None, list[int]]:
        """Return where to keep it (None: not at all, or it is there already), and the places that are given up.

        What is at `spare` stays, and what was used after it.
        """
        for prefix in self:
            if prefix.fixed >= fixed and self._covers(prefix.tokens, tokens):
                prefix.used = max(prefix.used, used)
                return None, []
        others = sorted((p for p in self if p.place != spare), key=lambda prefix: prefix.used)
        gone = [p for p in others if p.fixed <= fixed and self._covers(tokens, p.tokens)]
        over = self.tokens + len(tokens) - self._budget - sum(len(p.tokens) for p in gone)
        for prefix in others:
            if over <= 0 and (gone or self._free):
                break
            if prefix not in gone and prefix.used < used:
                over -= len(prefix.tokens)
                gone.append(prefix)
        if over > 0 or not (gone or self._free):
            return None, []
        for prefix in gone:
            self.discard(prefix.place)
        place = self._free.pop()
        self._prefixes[place] = Prefix(place, tuple(tokens), fixed, used)
        return place, [prefix.place for prefix in gone if prefix.place != place]

    def discard(self, place: int) -> None:
        """Forget what is at `place`."""
        if self._prefixes.pop(place, None) is not None:
            self._free.append(place)

    def clear(self) -> None:
        """Forget everything."""
        for place in list(self._prefixes):
            self.discard(place)

    def _covers(self, tokens: Sequence[int], prefix: Sequence[int]) -> bool:
        """Tell whether `tokens` serve whoever `prefix` would."""
        if len(prefix) > len(tokens) or (not self._cuts and len(prefix) < len(tokens)):
            return False
        return common_length(tokens, prefix, len(prefix)) == len(prefix)
