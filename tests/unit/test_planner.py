"""The planner against brute force, and against what anybody would expect of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osync.core.plan import GIB, Layer, Link, Network, NoPlan, Objective, Plan, Shape, Shard, Wish
from osync.core.planner import HEADER, best_whole, explain, make_plan, when_to_split

LATENCY: Objective = "latency"
THROUGHPUT: Objective = "throughput"
FREE = Network()


@st.composite
def shapes(draw: st.DrawFn) -> Shape:
    layers = draw(
        st.lists(
            st.builds(Layer, st.integers(1, 50), st.integers(0, 3), st.none() | st.integers(0, 50)),
            min_size=1,
            max_size=6,
        )
    )
    cuts = draw(st.none() | st.frozensets(st.integers(0, 6)))
    embedding, output = draw(st.integers(0, 30)), draw(st.integers(0, 30))
    return Shape(tuple(layers), embedding, output, draw(st.booleans()), cuts)


def shards(most: int = 4) -> st.SearchStrategy[list[Shard]]:
    shard = st.builds(
        Shard,
        st.just(""),
        st.integers(0, 250),
        st.sampled_from([0.001, 0.002, 0.003, 0.01]),
        st.none() | st.sampled_from([0.0005, 0.02]),
        st.integers(0, 20),
    )
    return st.lists(shard, min_size=1, max_size=most).map(
        lambda found: [replace(shard, id=f"s{index}") for index, shard in enumerate(found)]
    )


links = st.builds(Link, st.sampled_from([0.0, 0.01, 0.05, 0.3]), st.sampled_from([float("inf"), 1000.0, 20.0]))
networks = st.builds(
    Network,
    st.dictionaries(st.tuples(*[st.sampled_from(["s0", "s1", "s2", "s3", "c"])] * 2), links, max_size=6),
    links,
)


@st.composite
def wishes(draw: st.DrawFn) -> Wish:
    least = draw(st.sampled_from([1, 1, 1, 2, 3]))
    most = draw(st.none() | st.integers(least, 4))
    return Wish(
        draw(st.integers(1, 8)), draw(st.integers(1, 2)), draw(st.sampled_from([LATENCY, THROUGHPUT])), least, most,
        None, draw(st.integers(0, 4)), draw(st.sampled_from([0.0, 0.02])), draw(st.sampled_from([None, "c"])),
    )  # fmt: skip


def every_plan(shape: Shape, shards: list[Shard], network: Network, wish: Wish) -> Iterator[tuple[float, float]]:
    """Yield the bottleneck and the time per token of each plan that is possible, as plainly as can be."""
    layers = len(shape.layers)
    inner = [cut for cut in range(1, layers) if shape.cuts is None or cut in shape.cuts]
    for count in range(wish.min_stages, min(len(shards), wish.max_stages or 99) + 1):
        for cuts in combinations(inner, count - 1):
            ranges = list(zip((0, *cuts), (*cuts, layers), strict=True))
            for order in permutations(shards, count):
                times, waits, transfers, fits = [], [], [], True
                for position, ((first, last), shard) in enumerate(zip(ranges, order, strict=True)):
                    part = shape.layers[first:last]
                    held = sum(layer.weight_bytes + layer.kv_bytes_per_token * wish.tokens for layer in part)
                    held += shape.ends(first == 0, last == layers)
                    fits = fits and held + shard.reserve_bytes <= shard.memory_bytes
                    seconds = wish.overhead_s + shard.s_per_byte * sum(layer.work for layer in part)
                    if last == layers:
                        rate = shard.s_per_byte if shard.output_s_per_byte is None else shard.output_s_per_byte
                        seconds += rate * shape.output_bytes
                        ways = [(shard.id, order[0].id)]
                        if wish.relay is not None:
                            ways = [(shard.id, wish.relay), (wish.relay, order[0].id)]
                        waits += [network.link(*way).round_trip_s / 2 for way in ways]
                    else:
                        link = network.link(shard.id, order[position + 1].id)
                        transfers.append(wish.activation_bytes / link.bytes_per_s)
                        waits.append(link.round_trip_s / 2 + transfers[-1])
                    times.append(seconds)
                if fits:
                    yield max(*times, *transfers, 0.0), sum(times) + sum(waits)


def check(plan: Plan, shape: Shape, shards: list[Shard], wish: Wish) -> None:
    by_id = {shard.id: shard for shard in shards}
    assert len({stage.shard for stage in plan.stages}) == len(plan.stages)
    assert wish.min_stages <= len(plan.stages) <= (wish.max_stages or 99)
    assert plan.stages[0].first == 0
    assert plan.stages[-1].last == len(shape.layers)
    for before, after in zip(plan.stages, plan.stages[1:], strict=False):
        assert before.last == after.first
        assert shape.cuts is None or after.first in shape.cuts
    for stage in plan.stages:
        assert stage.first < stage.last
        part = shape.layers[stage.first : stage.last]
        assert stage.kv_bytes == sum(layer.kv_bytes_per_token for layer in part) * wish.tokens
        ends = shape.ends(stage.first == 0, stage.last == len(shape.layers))
        assert stage.weight_bytes == sum(layer.weight_bytes for layer in part) + ends
        assert stage.weight_bytes + stage.kv_bytes <= by_id[stage.shard].room
    assert plan.token_s == pytest.approx(sum(stage.predicted_s + stage.hop_s for stage in plan.stages))
    assert plan.bottleneck_s >= max(stage.predicted_s for stage in plan.stages)


@settings(max_examples=200)
@given(shapes(), shards(), networks, wishes())
def test_it_finds_what_trying_everything_finds(shape: Shape, shards: list[Shard], network: Network, wish: Wish) -> None:
    plan = make_plan(shape, shards, network, wish)
    possible = list(every_plan(shape, shards, network, wish))
    if isinstance(plan, NoPlan):
        assert not possible
        assert plan.needed_bytes == shape.weight_bytes + shape.kv_bytes(wish.tokens)
        assert plan.lent_bytes == sum(shard.room for shard in shards)
        return
    check(plan, shape, shards, wish)
    if wish.objective == LATENCY:
        assert plan.token_s == pytest.approx(min(token for _, token in possible))
    else:
        least = min(bottleneck for bottleneck, _ in possible)
        assert plan.bottleneck_s == pytest.approx(least)
        assert plan.token_s == pytest.approx(min(token for slow, token in possible if slow <= least * (1 + 1e-9)))
    for other in plan.alternatives:
        assert abs(other.stages - len(plan.stages)) == 1
        figure = (other.token_s, plan.token_s) if wish.objective == LATENCY else (other.bottleneck_s, plan.bottleneck_s)
        assert figure[0] >= figure[1] * (1 - 1e-9)


@given(shapes(), shards(), networks, wishes(), st.data())
def test_more_is_never_worse(
    shape: Shape, shards: list[Shard], network: Network, wish: Wish, data: st.DataObject
) -> None:
    plan = make_plan(shape, shards, network, wish)
    index = data.draw(st.integers(0, len(shards) - 1))
    roomier = [*shards]
    roomier[index] = replace(shards[index], memory_bytes=shards[index].memory_bytes + data.draw(st.integers(1, 200)))
    fewer = shards[:index] + shards[index + 1 :]
    better = make_plan(shape, roomier, network, wish)
    worse = make_plan(shape, fewer, network, wish)
    for small, large in ((plan, better), (worse, plan)):
        if isinstance(small, Plan):
            assert isinstance(large, Plan)
            if wish.objective == LATENCY:
                assert large.token_s <= small.token_s * (1 + 1e-9)
            else:
                assert large.bottleneck_s <= small.bottleneck_s * (1 + 1e-9)


@settings(max_examples=8)
@given(st.data())
def test_with_twenty_shards_it_finds_no_less_than_the_fair_share(data: st.DataObject) -> None:
    many = [
        Shard(f"s{index}", data.draw(st.integers(2, 6)) * 100, data.draw(st.sampled_from([1e-4, 2e-4, 4e-4])))
        for index in range(20)
    ]
    shape = llama(layers=40)
    wish = Wish(1, overhead_s=1e-4)
    plan = make_plan(shape, many, Network(default=Link(0.002)), wish)
    assert isinstance(plan, Plan)
    check(plan, shape, many, wish)
    by_memory = sorted(many, key=lambda shard: -shard.memory_bytes)
    seconds, layers = 0.0, 0
    for shard in by_memory:  # the largest first, each filled
        taken = min(shard.memory_bytes // 50, 40 - layers)
        layers += taken
        seconds += taken * 50 * shard.s_per_byte + (1e-4 + 0.001 if taken else 0)
    assert plan.token_s <= seconds + 1e-9


def llama(layers: int = 32, size: int = 50, parameters: int = 8_000_000_000) -> Shape:
    return Shape(tuple([Layer(size, 0)] * layers), parameters=parameters)


def counts(plan: Plan | NoPlan) -> dict[str, int]:
    assert isinstance(plan, Plan), plan.reason
    return {stage.shard: stage.last - stage.first for stage in plan.stages}


def test_a_host_twice_as_fast_gets_twice_the_layers() -> None:
    fast, slow = Shard("fast", 10_000, 0.001), Shard("slow", 10_000, 0.002)
    plan = make_plan(llama(30), [slow, fast], FREE, Wish(1, objective=THROUGHPUT))
    assert counts(plan) == {"fast": 20, "slow": 10}


def test_one_stream_stays_on_the_fastest_host_that_holds_it_all() -> None:
    hosts = [Shard("a", 10_000, 0.002), Shard("b", 10_000, 0.001), Shard("c", 100, 0.0001)]
    plan = make_plan(llama(), hosts, Network(default=Link(1.0)), Wish(1))
    assert counts(plan) == {"b": 32}


def test_the_output_layer_costs_its_stage_some_layers() -> None:
    shape = replace(llama(32), output_bytes=400)  # as much as 8 layers
    hosts = [Shard("a", 10_000, 0.001), Shard("b", 10_000, 0.001)]
    plan = make_plan(shape, hosts, FREE, Wish(1, objective=THROUGHPUT))
    assert isinstance(plan, Plan)
    assert [stage.last - stage.first for stage in plan.stages] == [20, 12]


def test_order_follows_the_links() -> None:
    near, far = Link(0.001), Link(0.1)
    network = Network({("a", "c"): near, ("c", "b"): near, ("b", "d"): near, ("d", "a"): near}, far)
    hosts = [Shard(name, 8 * 50, 0.001) for name in "abcd"]
    plan = make_plan(llama(32), hosts, network, Wish(1))
    assert isinstance(plan, Plan)
    assert all(stage.hop_s == pytest.approx(0.0005) for stage in plan.stages)


def test_a_slow_link_is_a_bottleneck_too() -> None:
    network = Network({("a", "b"): Link(0, 1.0)}, Link())
    hosts = [Shard("a", 10_000, 0.001), Shard("b", 10_000, 0.001)]
    alone = make_plan(llama(32), hosts, network, Wish(1, objective=THROUGHPUT, activation_bytes=4))
    assert len(counts(alone)) == 1
    both = make_plan(llama(32), hosts, network, Wish(1, objective=THROUGHPUT))
    assert len(counts(both)) == 2


def test_cuts_only_where_the_architecture_allows_them() -> None:
    shape = replace(llama(32), cuts=frozenset(range(0, 32, 6)))
    plan = make_plan(shape, [Shard("a", 17 * 50, 0.001), Shard("b", 10_000, 0.002)], FREE, Wish(1))
    assert counts(plan) in ({"a": 12, "b": 20}, {"a": 14, "b": 18})


def test_chosen_excluded_and_spare_shards() -> None:
    hosts = [Shard("a", 10_000, 0.001), Shard("b", 10_000, 0.002), Shard("c", 1_000, 0.0001, priority=-1)]
    assert counts(make_plan(llama(), hosts, FREE, Wish(1, shards=frozenset({"b"})))) == {"b": 32}
    assert counts(make_plan(llama(), [replace(hosts[0], is_excluded=True), *hosts[1:]], FREE, Wish(1))) == {"b": 32}
    assert counts(make_plan(llama(), hosts, FREE, Wish(1))) == {"a": 32}
    small = [replace(hosts[0], memory_bytes=1_000), replace(hosts[1], is_excluded=True), hosts[2]]
    assert counts(make_plan(llama(), small, FREE, Wish(1))) == {"a": 12, "c": 20}


def test_what_fits_nowhere_is_said_in_numbers() -> None:
    shape = Shape(tuple([Layer(GIB, 1 << 16)] * 40), parameters=70_000_000_000)
    hosts = [Shard("mini", 16 * GIB, 1e-11), Shard("desk", 15 * GIB, 1e-11, reserve_bytes=GIB // 2)]
    plan = make_plan(shape, hosts, FREE, Wish(8192, 2))
    assert isinstance(plan, NoPlan)
    assert plan.reason == (
        "needs 80.0 GiB (40.0 GiB weights, 40.0 GiB KV cache for 2 x 8192 tokens); 2 shards together lend 30.5 GiB "
        "(mini 16.0 GiB, desk 14.5 GiB)"
    )
    more = make_plan(shape, [*hosts, Shard("big", 12 * GIB, 1e-11)], FREE, Wish(8192, 2))
    assert isinstance(more, NoPlan)
    assert more.reason.endswith("; a context of 512 tokens at most would fit")
    few = make_plan(shape, [*hosts, Shard("big", 60 * GIB, 1e-11)], FREE, Wish(8192, 2, max_stages=2))
    assert isinstance(few, NoPlan)
    assert few.reason.endswith(", the largest 2 only 76.0 GiB, and 2 stages are the most that it may have")
    uncut = make_plan(replace(shape, cuts=frozenset()), [*hosts, Shard("big", 60 * GIB, 1e-11)], FREE, Wish(8192, 2))
    assert isinstance(uncut, NoPlan)
    assert uncut.reason.endswith(", the largest 1 only 60.0 GiB, and 1 stage is the most that it may have")
    coarse = make_plan(
        replace(shape, cuts=frozenset({20})), [Shard(name, 30 * GIB, 1e-11) for name in "abc"], FREE, Wish(8192, 2)
    )
    assert isinstance(coarse, NoPlan)
    assert coarse.reason.endswith(", the largest 2 only 60.0 GiB, and 2 stages are the most that it may have")
    none = make_plan(shape, hosts, FREE, Wish(8192, 2, shards=frozenset({"x"})))
    assert isinstance(none, NoPlan)
    assert none.reason.endswith("and no shard may be used")
    part = make_plan(Shape((Layer(2 * GIB, 0),) * 3), [Shard(name, 3 * GIB, 1e-11) for name in "ab"], FREE, Wish(1))
    assert isinstance(part, NoPlan)
    assert part.reason.endswith("; no cut between layers fits: a part of 2.0 GiB stays whole")
    many = make_plan(shape, hosts, FREE, Wish(1, min_stages=3))
    assert isinstance(many, NoPlan)
    assert many.reason.endswith("; 3 stages were asked for and 2 are possible")


def test_it_explains_itself() -> None:
    shape = Shape(tuple([Layer(GIB, 1 << 20)] * 8), embedding_bytes=GIB, output_bytes=GIB)
    hosts = [Shard("a", 6 * GIB, 1e-12), Shard("b", 9 * GIB, 2e-12), Shard("c", 9 * GIB, 8e-12)]
    plan = make_plan(shape, hosts, Network(default=Link(0.004)), Wish(256))
    assert isinstance(plan, Plan)
    assert plan.reason == "2 stages: 18.0 ms a token; 1 cannot hold the model; 3 would need 26.4 ms"
    table = explain(plan)
    assert all(len(row) == len(HEADER) for row in table)
    assert table[-1] == ("all", "2 shards", "8 layers", "10.0 GiB", "2.0 GiB", "14.0 ms", "4.0 ms")
    assert [row[:3] for row in table[:-1]] == [("0", "b", "0-3"), ("1", "a", "4-7")]


BIG = 40_000_000_000
ALONE = Shard("alone", 10_000, 0.001)


@pytest.mark.parametrize(
    ("requested", "allowed", "parameters", "memory", "hop", "is_split", "says"),
    [
        (False, True, BIG, 10_000, 0.0, False, "forbidden by the request; alone alone needs"),
        (None, False, BIG, 100, 0.0, False, "forbidden by the settings; needs"),
        (True, False, 1, 10_000, 9.9, True, "asked for"),
        (None, True, 1, 100, 9.9, True, "the largest host has"),
        (None, True, 1_000_000_000, 10_000, 0.0, False, "small enough to stay whole (1.0 of 13.0 billion"),
        (None, True, BIG, 10_000, 0.0, True, "1 stages need 800.0 ms a token, alone alone needs 1600.0 ms"),
        (None, True, BIG, 10_000, 9.9, True, "1 stages need 800.0 ms a token"),
    ],
)
def test_when(
    requested: bool | None, allowed: bool, parameters: int, memory: int, hop: float, is_split: bool, says: str
) -> None:
    shape, wish = llama(parameters=parameters), Wish(1)
    plan = make_plan(shape, [Shard("a", 10_000, 0.0005)], Network(default=Link(hop)), wish)
    host = replace(ALONE, memory_bytes=memory)
    decision = when_to_split(shape, [host], plan, wish, requested=requested, allowed=allowed)
    assert decision.is_split is is_split
    assert says in decision.reason
    assert decision.host == ("alone" if not is_split and memory > 100 else "")


def test_when_a_plan_is_slower_or_there_is_none() -> None:
    shape, wish = llama(parameters=BIG), Wish(1)
    hosts = [Shard(name, 1_000, 0.001) for name in "ab"]
    slow = make_plan(shape, hosts, Network(default=Link(1.0)), wish)
    assert when_to_split(shape, [ALONE], slow, wish).host == "alone"
    nothing = make_plan(shape, hosts[:1], FREE, wish)
    assert isinstance(nothing, NoPlan)
    assert when_to_split(shape, [ALONE], nothing, wish).host == "alone"
    refused = when_to_split(shape, [ALONE], nothing, wish, requested=True)
    assert (refused.is_split, refused.reason) == (False, nothing.reason)
    assert when_to_split(shape, [], nothing, wish).host == ""


def test_the_best_whole_host_is_the_fastest_that_has_the_room() -> None:
    hosts = [replace(ALONE, id="x", memory_bytes=10), replace(ALONE, id="y", s_per_byte=0.002), ALONE]
    best = best_whole(llama(), hosts, Wish(1))
    assert best is not None
    assert best[0].id == "alone"
    assert best[1] == pytest.approx(1.6)
    assert best_whole(llama(), hosts[:1], Wish(1)) is None


def test_a_wish_that_makes_no_sense_is_refused() -> None:
    with pytest.raises(ValueError, match="at least"):
        make_plan(llama(), [ALONE], FREE, Wish(0))
    with pytest.raises(ValueError, match="at least"):
        make_plan(llama(), [ALONE], FREE, Wish(1, min_stages=3, max_stages=2))
