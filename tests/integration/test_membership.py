"""Membership: static peers become nodes of the view, and go again."""

from __future__ import annotations

from structlog.testing import capture_logs

from osync.cluster.membership import Membership
from osync.config import Settings
from osync.net.exchange import Body, Responder
from osync.net.memory import MemoryLink
from osync.types import NodeId, RequestHead
from tests.links import OK, FakeNode, node_process, node_state, serving, until

OWN = NodeId("proxy-1")


async def answer(head: RequestHead, body: Body, responder: Responder) -> None:
    await responder.start(OK)


def settings(*ports: int) -> Settings:
    return Settings(servers=tuple(f"127.0.0.1:{port}" for port in ports))


async def test_the_local_node_comes_first_and_peers_in_their_order():
    first, second = FakeNode(answer, node_state("a")), FakeNode(answer, node_state("b"))
    local = MemoryLink(answer, lambda: node_state(OWN))
    async with serving(first) as (one, _), serving(second) as (two, _):
        membership = Membership(settings(two, one), OWN, local)
        changes = 0

        def changed() -> None:
            nonlocal changes
            changes += 1

        membership.on_change(changed)
        await membership.start()
        try:
            assert [state.node_id for state, _ in membership.view.up()] == [OWN]
            await until(lambda: len(list(membership.view.usable())) == 3)
            assert [state.node_id for state, _ in membership.view.up()] == [OWN, "b", "a"]
            assert changes >= 2
            first.change(draining=True)
            await until(lambda: len(list(membership.view.usable())) == 2)
        finally:
            await membership.close()
        assert [state.node_id for state, _ in membership.view.up()] == [OWN]


async def test_up_and_down_are_logged_once_per_change_with_their_reason():
    with capture_logs() as logs:
        async with node_process() as (port, process):
            membership = Membership(settings(port), OWN, None)
            await membership.start()
            try:
                peer = membership.view.peers[0]
                await until(lambda: peer.usable)
                assert peer.last_seen > 0
                process.kill()
                await until(lambda: peer.failures >= 3)
                assert peer.error == "connection refused"
                assert not list(membership.view.up())
            finally:
                await membership.close()
    events = [(log["event"], log["address"], log["node"]) for log in logs if log["event"].startswith("node_")]
    where = f"127.0.0.1:{port}"
    assert events == [("node_up", where, "node-1"), ("node_down", where, "node-1")]


async def test_a_peer_that_never_answered_is_logged_as_down_with_its_reason():
    with capture_logs() as logs:
        membership = Membership(settings(1), OWN, None)
        await membership.start()
        try:
            peer = membership.view.peers[0]
            await until(lambda: peer.failures >= 2)
        finally:
            await membership.close()
    assert [(log["event"], log["reason"]) for log in logs] == [("node_down", "connection refused")]


async def test_a_peer_that_is_this_daemon_itself_is_left_out():
    with capture_logs() as logs:
        async with serving(FakeNode(answer, node_state(OWN))) as (port, service):
            membership = Membership(settings(port), OWN, MemoryLink(answer, lambda: node_state(OWN)))
            await membership.start()
            try:
                await until(lambda: len(membership.view.peers) == 1)
                assert membership.view.peers[0].link.address == "local"
                await until(lambda: len(service) == 0)
            finally:
                await membership.close()
    assert [log["event"] for log in logs if log["event"] in {"peer_is_self", "node_up"}] == ["peer_is_self"]
