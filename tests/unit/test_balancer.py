"""The choice of a node."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.core.balancer import Candidate, Choice, Miss, ask_around, pick
from osync.core.window import SPAN_S, Window
from osync.types import NodeId

A, B, C = NodeId("a"), NodeId("b"), NodeId("c")
MODEL = "m"


def candidate(node_id: NodeId, *, usable: bool = True, present: bool = True, loaded: bool = False) -> Candidate:
    names = frozenset({MODEL})
    return Candidate(
        node_id,
        f"host-{node_id}",
        usable,
        names if present or loaded else frozenset(),
        names if loaded else frozenset(),
    )


def choose(candidates: list[Candidate], in_flight: dict[NodeId, int] | None = None, **kwargs: Any) -> Choice | Miss:
    return pick(candidates, MODEL, in_flight or {}, rng=random.Random(1), **kwargs)


def test_loaded_comes_before_idle():
    choice = choose([candidate(A), candidate(B, loaded=True)], {B: 9})
    assert isinstance(choice, Choice)
    assert choice.node_id == B
    assert choice.reason == "loaded, 9 in flight"


def test_fewest_in_flight_among_equals():
    choice = choose([candidate(A, loaded=True), candidate(B, loaded=True)], {A: 2, B: 1})
    assert isinstance(choice, Choice)
    assert choice.node_id == B


def test_ties_are_broken_by_lot():
    rng = random.Random(7)
    picked = {pick([candidate(A), candidate(B)], MODEL, {}, rng=rng) for _ in range(64)}
    assert {choice.node_id for choice in picked if isinstance(choice, Choice)} == {A, B}


@pytest.mark.parametrize(
    ("candidates", "excluded", "why"),
    [
        ([], (), "no_nodes"),
        ([candidate(A, usable=False, present=False)], (), "no_nodes"),
        ([candidate(A, present=False)], (), "no_model"),
        ([candidate(A, usable=False), candidate(B, present=False)], (), "unusable"),
        ([candidate(A), candidate(B)], (A, B), "tried"),
    ],
)
def test_reasons_for_no_choice(candidates, excluded, why):
    assert choose(candidates, excluded=excluded) == Miss(why)


def test_pin_goes_to_its_node_whatever_the_load():
    nodes = [candidate(A, loaded=True), candidate(B, present=False)]
    assert choose(nodes, pin="host-b") == Choice(B, "pinned")
    assert choose(nodes, pin="b") == Choice(B, "pinned")
    assert choose(nodes, pin="z") == Miss("no_such_node")
    assert choose(nodes, pin="b", excluded=(B,)) == Miss("tried")


def test_asking_around_takes_usable_nodes_one_after_the_other():
    absent = [candidate(A, usable=False, present=False), candidate(B, present=False), candidate(C, present=False)]
    first = ask_around(absent)
    assert isinstance(first, Choice)
    assert (first.node_id, "no node reports" in first.reason) == (B, True)
    second = ask_around(absent, (B,))
    assert isinstance(second, Choice)
    assert second.node_id == C
    assert ask_around(absent, (B, C)) == Miss("no_model")
    assert ask_around([]) == Miss("no_model")


nodes = st.lists(
    st.builds(
        candidate,
        st.sampled_from([A, B, C]),
        usable=st.booleans(),
        present=st.booleans(),
        loaded=st.booleans(),
    ),
    unique_by=lambda c: c.node_id,
)
loads = st.dictionaries(st.sampled_from([A, B, C]), st.integers(0, 5))


@given(nodes, loads, st.sets(st.sampled_from([A, B, C])), st.integers())
def test_a_choice_is_always_a_best_replica(candidates, in_flight, excluded, seed):
    choice = pick(candidates, MODEL, in_flight, excluded=excluded, rng=random.Random(seed))
    fit = [c for c in candidates if c.usable and MODEL in c.present and c.node_id not in excluded]
    if not fit:
        assert isinstance(choice, Miss)
        return
    assert isinstance(choice, Choice)
    picked = next(c for c in fit if c.node_id == choice.node_id)
    rank = min((MODEL not in c.loaded, in_flight.get(c.node_id, 0)) for c in fit)
    assert (MODEL not in picked.loaded, in_flight.get(picked.node_id, 0)) == rank


def test_window_counts_the_last_minute():
    window = Window()
    for second in range(10):
        window.add(100.0 + second, 0.5, second % 2 == 0)
    figures = window.figures(109.5)
    assert (figures.requests, figures.errors) == (10, 5)
    assert figures.requests_per_s == pytest.approx(1.0)
    assert figures.mean_s == figures.p50_s == figures.p99_s == pytest.approx(0.5)
    assert window.figures(109.0 + SPAN_S).requests == 0
    assert window.requests == 10


@given(st.lists(st.tuples(st.floats(0, 5), st.floats(0, 9)), min_size=1, max_size=700))
def test_window_never_counts_more_than_it_saw(steps):
    window, now = Window(), 0.0
    for step, seconds in steps:
        now += step
        window.add(now, seconds, False)
    figures = window.figures(now)
    assert 1 <= figures.requests <= len(steps)
    assert figures.requests_per_s <= figures.requests
    assert figures.p50_s <= figures.p99_s
