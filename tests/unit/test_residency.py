"""Which models stay in memory: sums, the choice of who goes, and that it always comes to an end."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from osync.core.residency import Fits, Footprint, Never, Resident, Unload, Wait, make_room, together

GIB = 1 << 30


def test_a_mapped_file_counts_once_and_a_copy_each_time():
    mapped = Footprint(weights=4 * GIB, kv=GIB, compute=1, file="f")
    assert mapped.total == 5 * GIB + 1
    assert mapped.own == GIB + 1
    assert together([mapped, mapped]) == 4 * GIB + 2 * (GIB + 1)
    copied = replace(mapped, file=None)
    assert copied.own == copied.total
    assert together([copied, copied, mapped]) == 3 * copied.total
    assert together([]) == 0


def resident(key: str, *, users: int = 0, last_used: float = 0.0, is_leaving: bool = False) -> Resident:
    return Resident(key, Footprint(kv=10), users, last_used, is_leaving)


def test_the_least_recently_used_idle_one_goes_first():
    busy, old, new = resident("busy", users=1), resident("old", last_used=1.0), resident("new", last_used=2.0)
    assert make_room([busy, new, old], Footprint(kv=10), 35, 9) == Unload("old")
    assert make_room([busy, new, old], Footprint(kv=10), 100, 3) == Unload("old")
    assert make_room([busy, new, old], Footprint(kv=10), 40, 4) == Fits(10)


def test_without_an_idle_one_the_least_recently_used_busy_one_goes():
    first, second = resident("first", users=3, last_used=1.0), resident("second", users=1, last_used=2.0)
    assert make_room([second, first], Footprint(kv=10), 20, 9) == Unload("first")


def test_nobody_else_goes_while_one_that_leaves_makes_enough_room():
    leaving, staying = resident("leaving", is_leaving=True), resident("staying")
    assert make_room([leaving, staying], Footprint(kv=10), 20, 9) == Wait()
    assert make_room([leaving, staying], Footprint(kv=15), 20, 9) == Unload("staying")


def test_what_fits_not_even_alone_makes_nobody_go():
    assert make_room([resident("idle")], Footprint(weights=21), 20, 9) == Never(21, 20)
    assert make_room([], Footprint(), 0, 1) == Fits(0)


footprints = st.builds(
    Footprint, st.integers(0, 50), st.integers(0, 50), st.integers(0, 9), st.sampled_from([None, "f", "g"])
)
residents = st.lists(
    st.tuples(footprints, st.integers(0, 3), st.floats(0, 9), st.booleans()), max_size=6
).map(lambda rows: [Resident(n, *row) for n, row in enumerate(rows)])  # fmt: skip


@given(residents, footprints, st.integers(0, 200), st.integers(1, 5))
def test_it_comes_to_an_end_within_the_limits_and_takes_no_more_than_needed(others, newcomer, limit, most):
    unloaded: list[Resident] = []
    for _ in range(2 * len(others) + 1):
        decision = make_room(others, newcomer, limit, most)
        if isinstance(decision, Unload):
            victim = next(r for r in others if r.key == decision.key)
            assert not victim.is_leaving
            idle = [r for r in others if not r.is_leaving and not r.users]
            assert not idle or victim.last_used == min(r.last_used for r in idle)
            unloaded.append(victim)
            others = [replace(r, is_leaving=True) if r is victim else r for r in others]
        elif isinstance(decision, Wait):
            others = others[: (gone := next(n for n, r in enumerate(others) if r.is_leaving))] + others[gone + 1 :]
        else:
            break
    if isinstance(decision, Never):
        assert newcomer.total > limit
        assert not unloaded
    else:
        assert isinstance(decision, Fits)
        assert len(others) < most
        assert together([*(r.footprint for r in others), newcomer]) <= limit
        assert decision.room == limit - together(r.footprint for r in others)
        if unloaded:  # with the last of them still there it would not have fitted
            back = [*others, unloaded[-1]] if unloaded[-1].key not in {r.key for r in others} else others
            assert len(back) >= most + 1 or len(others) < most
