"""What decides without a plan, and who is a node at all."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osync.cluster.view import ClusterView, Peer
from osync.config import load, parse_count
from osync.core.splitting import Holder, as_hosts, holder, is_beyond, is_plainly_whole, parameters_of
from osync.errors import ConfigError
from osync.net.memory import MemoryLink
from osync.net.round_trip import SAMPLES, RoundTrip
from osync.types import (
    BackendKind,
    BackendState,
    Gpu,
    HostLoad,
    LoadedModel,
    ModelInfo,
    NodeId,
    NodeState,
    ShardState,
)
from osync.wire.options import InvalidOption, parse_options
from osync.wire.request import parse, with_options


@pytest.mark.parametrize(
    ("text", "count"),
    [("13B", 13_000_000_000), ("134.52M", 134_520_000), ("700m", 700_000_000), ("5", 5), ("2T", 2_000_000_000_000)],
)
def test_parameters_are_read_as_people_write_them(text: str, count: int):
    assert parse_count(text) == count


@pytest.mark.parametrize("text", ["", "B", "13GB", "-1", "a lot", "1e9"])
def test_what_is_no_number_of_parameters_is_refused(text: str):
    with pytest.raises(ConfigError, match="no number of parameters"):
        parse_count(text)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"distributed_threshold": "big"}, "distributed_threshold: 'big' is no number"),
        ({"stage_timeout": "soon"}, "stage_timeout: 'soon' is no duration"),
        ({"stage_timeout": "0s"}, "stage_timeout: '0s'"),
        ({"slice_cache": "much"}, "slice_cache: 'much' is no amount"),
        ({"activation_dtype": "f64"}, "'f64' is not one of f32, f16, q8"),
    ],
)
def test_wrong_settings_of_distribution_say_what_is_wrong(flags: dict[str, object], words: str):
    with pytest.raises(ConfigError, match=words):
        load(flags, {})


def test_settings_of_distribution_have_their_defaults_and_variables():
    settings = load({}, {}).settings
    assert (settings.distributed, settings.distributed_threshold, settings.stage_timeout) == (True, "13B", "5s")
    env = {"OSYNC_DISTRIBUTED": "false", "OSYNC_ACTIVATION_DTYPE": "q8", "OSYNC_STAGE_TIMEOUT": "1m30s"}
    settings = load({}, env).settings
    assert (settings.distributed, settings.activation_dtype, settings.stage_timeout) == (False, "q8", "1m30s")


def test_a_model_that_tells_no_parameters_has_as_many_as_its_bytes_allow():
    assert parameters_of("7.6B", 1) == 7_600_000_000
    assert parameters_of("", 4 << 30) == 8 << 30


def test_a_node_has_what_is_free_and_what_it_may_unload():
    load = HostLoad(memory_total=100, memory_free=10, gpus=(Gpu("g", 50, 20),))
    backend = BackendState("ollama", ok=True, loaded=(LoadedModel("m", size=30),))
    found = holder(NodeState(NodeId("a"), backend, load=load, shard=ShardState(s_per_byte=2e-9)), is_loaded=False)
    assert (found.room, found.total, found.s_per_byte) == (60, 150, 2e-9)
    unknown = holder(NodeState(NodeId("b"), backend), is_loaded=False)
    assert (unknown.room, unknown.total) == (0, 0)
    assert unknown.may_hold(1 << 60)
    assert unknown.could_hold(1 << 60)


@given(st.integers(0, 200), st.integers(0, 200), st.booleans())
def test_small_models_that_a_node_can_hold_are_whole(size: int, room: int, is_loaded: bool):
    one = Holder("a", is_loaded, room, room)
    fits = is_loaded or room == 0 or size <= room
    assert is_plainly_whole(size, 10, [one], threshold=11) is fits
    assert not is_plainly_whole(size, 11, [one], threshold=11)
    assert is_beyond(size, [one]) is not fits
    assert not is_plainly_whole(size, 10, [], threshold=11)
    assert is_beyond(size, [])


def test_a_node_of_unknown_speed_is_as_fast_as_the_fastest_shard():
    known, unknown = as_hosts([Holder("a", room=5, s_per_byte=3e-9), Holder("b", is_loaded=True)], [2e-9, 1e-9, 0.0])
    assert (known.s_per_byte, known.memory_bytes) == (3e-9, 5)
    assert (unknown.s_per_byte, unknown.memory_bytes) == (1e-9, 1 << 62)
    assert as_hosts([Holder("a")], [])[0].s_per_byte == 1e-9


def test_options_of_pipelines_are_read():
    runner = parse_options({"stages": 3, "shards": "b, a,", "activation_dtype": "q8"}).runner
    assert (runner.stages, runner.shards, runner.activation_dtype) == (3, ("a", "b"), "q8")
    assert parse_options({"stages": 0, "shards": []}).runner == parse_options({}).runner
    assert parse_options({"shards": ["y", "x", "y"]}).runner.shards == ("x", "y")
    wrongs: list[dict[str, object]] = [
        {"stages": "two"}, {"shards": 7}, {"shards": [7]}, {"activation_dtype": "f8"}, {"activation_dtype": []},
    ]  # fmt: skip
    for wrong in wrongs:
        with pytest.raises(InvalidOption):
            parse_options(wrong)


def test_options_of_pipelines_are_taken_out_of_bodies_and_put_back():
    body = (
        b'{"model":"m","prompt":"x","options":{"stages":2,"shards":["a"],"activation_dtype":null,"seed":1,"num_ctx":9}}'
    )
    request = parse("/api/generate", body, lambda _: "")
    assert request.pipeline_options == {"stages": 2, "shards": ["a"]}
    assert request.num_ctx == 9
    assert request.body == b'{"model":"m","prompt":"x","options":{"seed":1,"num_ctx":9}}'
    again = parse("/api/generate", with_options(request.body, request.pipeline_options), lambda _: "")
    assert again.pipeline_options == request.pipeline_options
    assert again.body == request.body
    plain = b'{"model":"m" , "prompt":"x","options":{"seed":1}}'
    assert parse("/api/generate", plain, lambda _: "").body is plain
    assert with_options(b'{"model":"m"}', {"stages": 2}) == b'{"model":"m","options":{"stages":2}}'


def _peer(name: str, kind: BackendKind, shard: ShardState | None = None) -> Peer:
    state = NodeState(NodeId(name), BackendState(kind, ok=kind != "none", models=(ModelInfo("m"),)), name, shard=shard)

    async def serve(*_: object) -> None:
        raise AssertionError

    return Peer(MemoryLink(serve, lambda: state, f"{name}:1"))


def test_daemons_without_the_node_role_are_no_nodes():
    shard, both, node = _peer("s", "none", ShardState()), _peer("b", "engine", ShardState()), _peer("n", "ollama")
    view = ClusterView([shard, both, node])
    assert [state.node_id for state, _ in view.up()] == ["b", "n"]
    assert [state.node_id for state, _ in view.usable()] == ["b", "n"]
    assert [state.node_id for state, _ in view.shards()] == ["s", "b"]
    assert [state.node_id for state, _ in view.daemons()] == ["s", "b", "n"]
    assert view.find("s") is None
    assert view.nodes == [both, node]


def test_a_peer_that_is_down_is_what_it_last_was():
    async def serve(*_: object) -> None:
        raise AssertionError

    unknown = Peer(MemoryLink(serve, lambda: None, "x:1"))
    assert unknown.may_be_node
    unknown.last = _peer("s", "none", ShardState()).state
    assert not unknown.may_be_node


def test_the_least_of_the_last_round_trips_counts():
    trip = RoundTrip()
    assert trip.seconds == 0.0
    for number, took in enumerate([0.5, 0.02, 0.9], 1):
        trip.ask()
        assert trip.due == number
        trip.sent(float(number))
        assert trip.due == 0
        trip.returned(number, number + took)
        trip.returned(number, number + 99.0)  # a second time
    assert trip.seconds == pytest.approx(0.02)
    for number in range(4, 4 + SAMPLES):
        trip.ask()
        trip.sent(0.0)
        trip.returned(number - 1, 0.001)  # an answer to an older one
        trip.returned(number, 0.3)
    assert trip.seconds == pytest.approx(0.3)
    trip.ask()
    trip.sent(0.0)
    trip.reset()  # another connection
    trip.returned(4 + SAMPLES, 0.001)
    assert trip.seconds == pytest.approx(0.3)
