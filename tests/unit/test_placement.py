"""Which shards get which stages: at first, after a loss, and in reserve."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from osync.coordinator.pipeline import Placed, Remains
from osync.coordinator.placement import Demand, ModelSource, ShardPeer, order, place, plan, stage_bytes, standbys
from osync.core.plan import NoPlan, Plan
from osync.core.stages import StageSettings
from osync.engine.gguf import read_header
from osync.errors import ModelUnusable
from osync.types import BackendState, HeldStage, NodeId, NodeState, ShardState
from tests.fakes.architectures import write_model

pytest.importorskip("gguf")
pytest.importorskip("numpy")

LAYERS = 6
DIGEST = "d" * 64


@pytest.fixture(scope="module")
def demand(tmp_path_factory: pytest.TempPathFactory) -> Demand:
    path: Path = write_model(tmp_path_factory.mktemp("model") / "model.gguf", "llama", LAYERS)
    model = ModelSource(name="m", digest=DIGEST, size=path.stat().st_size, header=read_header(path), vocabulary=path,
                        sources=("store:1",))  # fmt: skip
    return Demand(model=model, settings=StageSettings(context_length=64, sequences=2), stages=3)


def shard(name: str, free: int = 1 << 30, *, engine: str = "1", speed: float = 1e-9, draining: bool = False,
          held: tuple[HeldStage, ...] = (), digests: tuple[str, ...] = ()) -> ShardPeer:  # fmt: skip
    lends = ShardState(engine, 1 << 30, free, speed, digests, held)
    return ShardPeer(f"{name}:1", NodeState(NodeId(name), BackendState("none"), draining=draining, shard=lends), 0.001)


def stage(demand: Demand, peer: ShardPeer, first: int, last: int) -> Placed:
    return Placed(peer.address, order(demand, [peer], "p", "me", first, last))


def thirds(demand: Demand, *peers: ShardPeer) -> tuple[Placed, ...]:
    return tuple(stage(demand, peer, 2 * i, 2 * i + 2) for i, peer in enumerate(peers))


def shown(stages: list[Placed]) -> list[tuple[str, int, int]]:
    return [(placed.address[:-2], placed.order.first, placed.order.last) for placed in stages]


def test_shards_with_different_engines_do_not_serve_together(demand: Demand) -> None:
    peers = [shard("a"), shard("b", engine="2"), shard("c"), shard("d", engine="2", speed=5e-9)]
    found = plan(demand, peers)
    assert isinstance(found, Plan)
    assert {part.shard for part in found.stages} <= {"a:1", "c:1"}
    most = stage_bytes(demand, 0, LAYERS)
    little = [replace(peer, state=replace(peer.state, shard=replace(peer.lends, memory=1 << 20, memory_free=most // 3)))
              for peer in peers]  # fmt: skip
    refused = plan(demand, little)
    assert isinstance(refused, NoPlan)
    assert "different versions of llama.cpp (1, 2)" in refused.reason


def test_a_lost_stage_goes_to_the_fastest_spare_and_the_others_stay(demand: Demand) -> None:
    a, b, c, slow, fast = shard("a"), shard("b"), shard("c"), shard("d", speed=2e-9), shard("e")
    held = thirds(demand, a, b, c)
    found = place(demand, [a, c, slow, fast], Remains(held=(held[0], held[2])), pipeline="p", owner="me")
    assert shown(found) == [("a", 0, 2), ("e", 2, 4), ("c", 4, 6)]
    assert found[0] is held[0]


def test_a_standby_comes_before_a_spare(demand: Demand) -> None:
    a, b, c, slow, fast = shard("a"), shard("b"), shard("c"), shard("d", speed=2e-9), shard("e")
    held = thirds(demand, a, b, c)
    waiting = Placed(slow.address, replace(held[1].order, standby=True))
    remains = Remains(held=(held[0], held[2]), standby=(waiting,))
    found = place(demand, [a, c, slow, fast], remains, pipeline="p", owner="me")
    assert shown(found) == [("a", 0, 2), ("d", 2, 4), ("c", 4, 6)]
    assert not found[1].order.standby
    without = place(demand, [a, c, slow, fast], remains, pipeline="p", owner="me", without={slow.address})
    assert shown(without) == [("a", 0, 2), ("e", 2, 4), ("c", 4, 6)]


def test_two_lost_neighbours_are_replaced_by_the_standbys_of_one_shard(demand: Demand) -> None:
    a, b, c, spare = shard("a"), shard("b"), shard("c"), shard("d")
    held = thirds(demand, a, b, c)
    both = tuple(Placed(spare.address, replace(one.order, standby=True)) for one in held[1:])
    found = place(demand, [a, spare], Remains(held=held[:1], standby=both), pipeline="p", owner="me")
    assert shown(found) == [("a", 0, 2), ("d", 2, 4), ("d", 4, 6)]
    half = place(demand, [a, spare, shard("e")], Remains(held=held[:1], standby=both[1:]), pipeline="p", owner="me")
    assert shown(half)[0] == ("a", 0, 2)
    assert shown(half)[-1] == ("d", 4, 6)
    assert half[1].order.first == 2


def test_without_a_spare_the_model_is_cut_anew_by_giving_up_what_is_held(demand: Demand) -> None:
    held = thirds(demand, shard("a"), shard("b"), shard("c"))
    size = stage_bytes(demand, 0, LAYERS) + (65 << 20)  # with what a stage takes beside
    mine = HeldStage("p", "me", "m", 0, 2, LAYERS, size, "ready")
    a, c = shard("a", 0, held=(mine,)), shard("c", 0, held=(mine,))
    found = place(demand, [a, c], Remains(held=(held[0], held[2])), pipeline="p", owner="me")
    assert {address for address, _, _ in shown(found)} == {"a", "c"}
    assert (found[0].order.first, found[-1].order.last) == (0, LAYERS)
    with pytest.raises(ModelUnusable, match="m needs"):
        place(demand, [a, c], Remains(held=(held[0], held[2])), pipeline="another", owner="me", without={"a:1", "c:1"})


def test_who_leaves_gets_nothing_new(demand: Demand) -> None:
    peers = [shard("a"), shard("b"), shard("c"), shard("d", draining=True)]
    held = thirds(demand, *peers[:3])
    found = place(demand, peers, Remains(held=held[:2]), pipeline="p", owner="me", without={"c:1"})
    assert "d" not in {address for address, _, _ in shown(found)}


def test_an_order_names_whoever_has_the_file_now(demand: Demand) -> None:
    there, not_there = shard("a", digests=(DIGEST,)), shard("b")
    now = order(demand, [there, not_there], "p", "me", 0, 2)
    assert now.sources == ("a:1", "store:1")
    assert now == order(demand, [not_there], "p", "me", 0, 2)  # it is the same stage, wherever its file may be


def test_each_stage_gets_a_standby_where_most_is_free(demand: Demand) -> None:
    a, b, c = shard("a"), shard("b"), shard("c")
    stages = thirds(demand, a, b, c)
    need = stage_bytes(demand, 4, 6) + (65 << 20)
    large, small, other = shard("d", 2 * need), shard("e", need), shard("f", engine="2")
    found = standbys(demand, [a, b, c, large, small, other], stages, ())
    assert sorted(placed.address for placed in found) == ["d:1", "d:1", "e:1"]
    assert {placed.order for placed in found} == {placed.order for placed in stages}
    assert all(placed.order.standby for placed in found)
    assert not any(placed.address in "abc" for placed in found)


def test_a_standby_stays_where_it_is_and_goes_with_its_reason(demand: Demand) -> None:
    a, b, c, d, e = (shard(name) for name in "abcde")
    stages = thirds(demand, a, b, c)
    waiting = Placed(d.address, replace(stages[0].order, standby=True))
    stale = Placed(e.address, order(demand, [e], "p", "me", 0, 5))
    found = standbys(demand, [a, b, c, d, e], stages, (waiting, stale))
    assert waiting in found
    assert stale not in found
    assert len(found) == 3
    assert waiting not in standbys(demand, [a, b, c, e], stages, (waiting,))
    assert standbys(demand, [a, b, c, d], stages, (waiting,), without={"d:1"}) == []


def test_standbys_of_others_are_not_pushed_out_and_those_who_leave_come_first(demand: Demand) -> None:
    a, b, c = shard("a"), shard("b", draining=True), shard("c")
    stages = thirds(demand, a, b, c)
    need = max(stage_bytes(demand, 2 * i, 2 * i + 2) for i in range(3)) + (65 << 20)
    others = HeldStage("q", "me", "other", 0, 9, 9, 1 << 28, "standby")
    full = shard("d", (1 << 28) + need - (65 << 20), held=(others,))
    assert standbys(demand, [a, b, c, full], stages, ()) == []
    (found,) = standbys(demand, [a, b, c, shard("d", need)], stages, ())
    assert (found.order.first, found.order.last) == (2, 4)
