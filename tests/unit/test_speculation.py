"""Drafts by look-up: what is guessed has been said, and drafts are only made where they pay."""

from __future__ import annotations

from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from osync.core.speculation import LONGEST_MATCH, MOST_DRAFTS, SHORTEST_MATCH, DraftLength, Guess, Lookup

_TEXTS = st.lists(st.integers(0, 3), max_size=60)


def brute(tokens: Sequence[int], most: int) -> Guess:
    for n in range(min(LONGEST_MATCH, len(tokens)), SHORTEST_MATCH - 1, -1):
        for at in range(len(tokens) - 1, n - 1, -1):
            if list(tokens[at - n : at]) == list(tokens[-n:]):
                return Guess(tuple(tokens[at : at + most]), n)
    return Guess((), 0)


@given(_TEXTS, st.integers(1, MOST_DRAFTS))
def test_the_guess_is_what_followed_the_newest_longest_match(tokens: list[int], most: int) -> None:
    assert Lookup(tokens).guess(most) == brute(tokens, most)


@given(_TEXTS, _TEXTS)
def test_it_does_not_matter_how_tokens_arrive(head: list[int], tail: list[int]) -> None:
    lookup = Lookup(head)
    for token in tail:
        lookup.extend([token])
    assert lookup.guess(5) == Lookup(head + tail).guess(5)
    assert len(lookup) == len(head) + len(tail)


def test_nothing_to_guess() -> None:
    assert Lookup().guess(3).tokens == ()
    assert Lookup([1, 2, 3]).guess(3).tokens == ()
    assert Lookup([1, 2, 3, 1, 2]).guess(0).tokens == ()
    assert Lookup([1, 2, 3, 1, 2]).guess(3) == Guess((3, 1, 2), 2)


GOOD = Guess(tuple(range(MOST_DRAFTS)), 4)
POOR = Guess((1, 2, 3), 2)


def test_drafts_pay_where_a_trip_is_long_and_a_row_costs_little() -> None:
    assert DraftLength().choose(GOOD, plain_s=0.100, verify_s=0.125, row_s=0.001) >= 3
    assert DraftLength().choose(POOR, plain_s=0.100, verify_s=0.125, row_s=0.001) == 0


def test_no_drafts_where_rows_cost_as_much_as_trips() -> None:
    assert DraftLength().choose(GOOD, plain_s=0.010, verify_s=0.012, row_s=0.010) == 0


def test_nothing_is_drafted_before_anything_was_measured() -> None:
    assert DraftLength().choose(GOOD, plain_s=0.0, verify_s=0.0, row_s=0.0) == 0
    assert DraftLength().choose(Guess((), 0), plain_s=1.0, verify_s=1.0, row_s=0.0) == 0


def test_rejected_drafts_stop_it_and_it_tries_again_much_later() -> None:
    length = DraftLength()

    def wants() -> bool:
        return length.choose(GOOD, plain_s=0.100, verify_s=0.125, row_s=0.002) > 0

    trips = 0
    while wants():
        length.learn(GOOD.match, drafted=4, accepted=0)
        trips += 1
        assert trips < 12
    without = 0
    while not wants():
        length.plain()
        without += 1
        assert without < 1000
    assert without > 10


@given(st.lists(st.tuples(st.sampled_from((2, 3, 4)), st.integers(1, 8), st.integers(0, 8)), max_size=40))
def test_acceptance_stays_a_probability(trips: list[tuple[int, int, int]]) -> None:
    length = DraftLength()
    for match, drafted, accepted in trips:
        length.learn(match, drafted, min(drafted, accepted))
        length.plain()
    assert all(0 <= p <= 1 for p in length.acceptance.values())


def test_accepted_drafts_make_it_longer() -> None:
    length = DraftLength()
    before = length.choose(GOOD, plain_s=0.1, verify_s=0.125, row_s=0.004)
    for _ in range(20):
        length.learn(GOOD.match, drafted=8, accepted=8)
    assert length.choose(GOOD, plain_s=0.1, verify_s=0.125, row_s=0.004) > before
