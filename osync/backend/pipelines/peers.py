"""Shards as a coordinator needs them: with addresses that the other shards can reach too."""

from __future__ import annotations

import ipaddress
import socket
from dataclasses import replace

from osync.cluster.view import ClusterView, Peer
from osync.config import Settings
from osync.coordinator.placement import YIELDING, ShardPeer
from osync.types import NodeId, NodeState


def own_address(settings: Settings, grpc_port: int) -> str:
    """Return where other daemons reach this one; a wildcard listener by the address that faces the first peer."""
    host = settings.host
    if host in ("", "0.0.0.0", "::"):  # noqa: S104 (compared, not bound)
        host = _facing(settings.peers[0]) if settings.peers else "127.0.0.1"
    return f"[{host}]:{grpc_port}" if ":" in host else f"{host}:{grpc_port}"


def _facing(peer: str) -> str:
    host, _, port = peer.rpartition(":")
    try:
        kind, _, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_DGRAM)[0]
        with socket.socket(kind, socket.SOCK_DGRAM) as probe:
            probe.connect(address)  # sends nothing: it only looks up the route
            return str(probe.getsockname()[0])
    except OSError:
        return socket.gethostname()


class Shards:
    """The shards of a cluster view. `own_address` is this daemon's, "" where none is known."""

    def __init__(self, view: ClusterView, node_id: NodeId, own_address: str) -> None:
        self._view = view
        self._node_id = node_id
        self._own_address = own_address

    def address(self, peer: Peer) -> str:
        """Return where to dial a daemon, "" for this one where it cannot be reached."""
        address = peer.link.address
        return address if address.rpartition(":")[2].isdigit() else self._own_address

    def up(self) -> list[ShardPeer]:
        """Return the shards as they are now. This daemon's own is left out where only this host can reach it, and
        others are elsewhere: a pipeline's stages dial each other."""
        found = [
            ShardPeer(address, state, peer.link.round_trip_s)
            for state, peer in self._view.shards()
            if (address := self.address(peer))
        ]
        own = self._own_address
        if own and is_loopback(own) and not all(is_loopback(shard.address) for shard in found):
            found = [shard for shard in found if shard.address != own]
        return found

    def lendable(self) -> list[ShardPeer]:
        """The same, with what this proxy's own pipelines hold taken for free: they make room for others."""
        lendable = []
        for shard in self.up():
            lends = shard.lends
            mine = [stage for stage in lends.stages if stage.owner == self._node_id and stage.state not in YIELDING]
            held = sum(stage.size for stage in mine)
            free = min(lends.memory, lends.memory_free + held)
            state = replace(shard.state, shard=replace(lends, memory_free=free))
            lendable.append(ShardPeer(shard.address, state, shard.round_trip_s))
        return lendable

    def sources(self, digest: str) -> tuple[str, ...]:
        """Return the addresses of the daemons that say they have a model's file."""
        return tuple(
            address for state, peer in self._view.daemons() if _has(state, digest) and (address := self.address(peer))
        )


def is_loopback(address: str) -> bool:
    """True if host:port can only be reached from its own host."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _has(state: NodeState, digest: str) -> bool:
    if state.shard is not None and digest in state.shard.digests:
        return True
    return any(model.digest == digest for model in state.backend.models)
