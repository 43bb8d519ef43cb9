"""How many layers fit on a host's accelerators."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from osync.core.offload import Offload, count_fitting, plan

LAYERS = [100] * 10
OUTPUT = 50


def test_no_device_no_layers():
    assert plan(LAYERS, OUTPUT, [], reserve=0) == Offload(0, ())


def test_all_go_to_the_one_device_with_most_room():
    assert plan(LAYERS, OUTPUT, [1500, 2000], reserve=100) == Offload(11, (1,))


def test_what_does_not_fit_on_one_goes_over_several():
    assert plan(LAYERS, OUTPUT, [800, 800], reserve=100) == Offload(11, (0, 1))


def test_what_fits_nowhere_whole_goes_as_far_as_it_fits():
    # 550 bytes of room: the output layer and five others.
    assert plan(LAYERS, OUTPUT, [650], reserve=100) == Offload(6, (0,))
    assert plan(LAYERS, OUTPUT, [100], reserve=100) == Offload(0, ())


def test_what_is_asked_for_is_taken_as_it_is():
    assert plan(LAYERS, OUTPUT, [300], reserve=100, wanted=99) == Offload(11, (0,))
    assert plan(LAYERS, OUTPUT, [300], reserve=100, wanted=3) == Offload(3, (0,))
    assert plan(LAYERS, OUTPUT, [5000], reserve=100, wanted=0) == Offload(0, ())
    assert plan(LAYERS, OUTPUT, [700, 700], reserve=0, wanted=11) == Offload(11, (0, 1))


def test_the_main_device_is_the_only_one():
    assert plan(LAYERS, OUTPUT, [400, 5000], reserve=0, main=0) == Offload(4, (0,))


def test_spread_uses_all_that_have_room():
    assert plan(LAYERS, OUTPUT, [5000, 50, 5000], reserve=100, spread=True) == Offload(11, (0, 2))


sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


@given(sizes, st.integers(1, 1000), st.lists(st.integers(0, 20000), max_size=4), st.integers(0, 500))
def test_a_plan_never_takes_more_than_there_is(layers: list[int], output: int, free: list[int], reserve: int):
    found = plan(layers, output, free, reserve=reserve)
    assert 0 <= found.layers <= len(layers) + 1
    assert bool(found.layers) == bool(found.devices)
    taken = sum([output, *reversed(layers)][: found.layers])
    assert taken <= sum(max(0, free[i] - reserve) for i in found.devices)


@given(sizes, st.integers(1, 1000), st.integers(0, 40000), st.integers(0, 1000))
def test_more_memory_never_fits_less(layers: list[int], output: int, room: int, more: int):
    assert count_fitting(layers, output, [room]) <= count_fitting(layers, output, [room + more])
