"""Draft tokens without a draft model: guessed from what the text said before, and no more of them than pay.

Prompt look-up decoding: where the last n tokens have occurred before, what followed them then is likely to follow
now (A. Saxena, 2023). The number of drafts is chosen by running acceptance and measured times.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final

MOST_DRAFTS: Final = 12
LONGEST_MATCH: Final = 4
SHORTEST_MATCH: Final = 2
_PRIOR: Final = {2: 0.2, 3: 0.5, 4: 0.75}
"""Acceptance that a match of so many tokens starts with."""
_WEIGHT: Final = 0.12
_FORGET: Final = 0.001
"""How far acceptance goes back towards its start with every token that came without a draft."""
_MARGIN: Final = 1.05
"""Drafts must promise to be so much faster: the estimates are no better than that."""


@dataclass(frozen=True, slots=True)
class Guess:
    """Tokens that may come next, and how many tokens before them matched."""

    tokens: tuple[int, ...]
    match: int


NOTHING: Final = Guess((), 0)


class Lookup:
    """An index of one sequence's n-grams, kept up to date token by token."""

    def __init__(self, tokens: Sequence[int] = ()) -> None:
        self._tokens: list[int] = []
        self._after: list[dict[tuple[int, ...], int]] = [{} for _ in range(LONGEST_MATCH + 1)]
        self.extend(tokens)

    def __len__(self) -> int:
        return len(self._tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        """Add what came."""
        held = self._tokens
        for token in tokens:
            # What is indexed has a follower: the last n tokens themselves must not be found.
            at = len(held)
            for n in range(SHORTEST_MATCH, LONGEST_MATCH + 1):
                if at >= n:
                    self._after[n][tuple(held[at - n :])] = at
            held.append(token)

    def guess(self, most: int) -> Guess:
        """Return up to `most` tokens after the newest earlier place of the longest match."""
        held = self._tokens
        if most > 0:
            for n in range(min(LONGEST_MATCH, len(held)), SHORTEST_MATCH - 1, -1):
                at = self._after[n].get(tuple(held[-n:]))
                if at is not None:
                    return Guess(tuple(held[at : at + most]), n)
        return NOTHING


@dataclass(slots=True)
class DraftLength:
    """How many drafts pay, for one sequence. Times in seconds."""

    acceptance: dict[int, float] = field(default_factory=lambda: dict(_PRIOR))
    """Estimated odds that a draft is accepted if those before it were, by length of the match."""

    def choose(self, guess: Guess, plain_s: float, verify_s: float, row_s: float) -> int:
        """Return how many tokens of a guess to verify; 0 is plain decoding.

        `plain_s`: time per token without drafts; `verify_s`: of one trip that verifies, without the time of its
        additional rows; `row_s`: what each of these adds.
        """
        if not guess.tokens or plain_s <= 0:
            return 0
        p = self.acceptance[guess.match]
        best, best_rate = 0, _MARGIN / plain_s
        tokens, odds = 1.0, 1.0
        for k in range(1, min(len(guess.tokens), MOST_DRAFTS) + 1):
            odds *= p
            tokens += odds
            rate = tokens / (verify_s + k * row_s)
            if rate > best_rate:
                best, best_rate = k, rate
        return best

    def learn(self, match: int, drafted: int, accepted: int) -> None:
        """Take what became of a trip's drafts."""
        p = self.acceptance[match]
        for index in range(min(accepted + 1, drafted)):
            p += _WEIGHT * ((1.0 if index < accepted else 0.0) - p)
        self.acceptance[match] = p

    def plain(self) -> None:
        """Take note of a token that came without drafts: after many, it is worth another try."""
        for match, prior in _PRIOR.items():
            self.acceptance[match] += _FORGET * (prior - self.acceptance[match])
