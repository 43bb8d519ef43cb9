"""The cluster as this daemon sees it: one link per known daemon, and what its state says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from osync.net.exchange import Link
from osync.types import NodeId, NodeState


def is_node(state: NodeState) -> bool:
    """Return True if the daemon has the node role: only those get requests."""
    return state.backend.kind != "none"


@dataclass(slots=True)
class Peer:
    """One known address and the link to it. A peer that never answered has no node id yet."""

    link: Link
    last_seen: float = 0.0
    """Unix time of its newest state; 0 before the first."""
    failures: int = 0
    """Connection attempts that failed since it last answered."""
    error: str = ""
    last: NodeState | None = None
    """Its newest state, also while it is down; None if it never answered."""

    @property
    def state(self) -> NodeState | None:
        """Its newest state while it is up, else None."""
        return self.link.state

    @property
    def usable(self) -> bool:
        """True if it is up, not draining, and its backend answers."""
        state = self.link.state
        return state is not None and state.backend.ok and not state.draining

    @property
    def may_be_node(self) -> bool:
        """True unless it said that it is none; one that never answered may be."""
        known = self.link.state or self.last
        return known is None or is_node(known)


@dataclass(slots=True)
class ClusterView:
    """All peers of a proxy, in order of configuration: nodes, shards, and daemons that are both."""

    peers: list[Peer] = field(default_factory=list)

    @property
    def nodes(self) -> list[Peer]:
        """The peers that are nodes, or may be."""
        return [peer for peer in self.peers if peer.may_be_node]

    def daemons(self) -> list[tuple[NodeState, Peer]]:
        """Return each daemon that is up once, whatever its roles: the local link first."""
        found: dict[NodeId, tuple[NodeState, Peer]] = {}
        for peer in list(self.peers):
            state = peer.link.state
            if state is not None and state.node_id not in found:
                found[state.node_id] = (state, peer)
        return list(found.values())

    def up(self) -> list[tuple[NodeState, Peer]]:
        """Return each node that is up once: the local link first, whatever its backend says."""
        return [(state, peer) for state, peer in self.daemons() if is_node(state)]

    def usable(self) -> Iterator[tuple[NodeState, Peer]]:
        """Yield each node that may get requests."""
        return ((state, peer) for state, peer in self.up() if peer.usable)

    def shards(self) -> list[tuple[NodeState, Peer]]:
        """Return each daemon that is up and lends as a shard once, also those that are nodes too."""
        return [(state, peer) for state, peer in self.daemons() if state.shard is not None]

    def find(self, node_id: str) -> tuple[NodeState, Peer] | None:
        """Return the node of that id or host name if it is up."""
        return next(((s, p) for s, p in self.up() if node_id in (s.node_id, s.hostname)), None)
