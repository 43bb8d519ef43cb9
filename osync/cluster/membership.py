"""Keeps the cluster view true: one link per known address, and what each says of itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import structlog

from osync.cluster.view import ClusterView, Peer
from osync.config import Settings
from osync.net.memory import MemoryLink
from osync.net.tasks import Tasks
from osync.net.uplink import RemoteLink
from osync.types import NodeId

log = structlog.get_logger("osync.cluster")


class Membership:
    """Owns all links. The local one comes first in the view."""

    def __init__(self, settings: Settings, node_id: NodeId, local: MemoryLink | None) -> None:
        self.view = ClusterView()
        self._node_id = node_id
        self._tasks = Tasks("membership")
        self._listeners: list[Callable[[], None]] = []
        self._remotes: list[_Remote] = []
        self._local = local
        if local is not None:
            self.view.peers.append(Peer(local))
        for address in settings.peers:
            remote = _Remote(Peer(RemoteLink(address, node_id)), self)
            self._remotes.append(remote)
            self.view.peers.append(remote.peer)

    def on_change(self, notify: Callable[[], None]) -> None:
        """Call `notify` in the loop whenever a node's state came in, or it went down."""
        self._listeners.append(notify)

    async def start(self) -> None:
        """Begin to connect to all peers."""
        for remote in self._remotes:
            remote.link.start()

    async def close(self) -> None:
        """Break all links; what still runs over them ends."""
        await asyncio.gather(*(remote.link.close() for remote in self._remotes))
        await self._tasks.close()
        if self._local is not None:
            await self._local.close()

    def changed(self, remote: _Remote) -> None:
        """Take note that a link changed; a peer that is this daemon itself is left out from now on."""
        state = remote.link.state
        if state is not None and state.node_id == self._node_id:
            log.info("peer_is_self", address=remote.link.address)
            self.view.peers.remove(remote.peer)
            self._remotes.remove(remote)
            self._tasks.spawn("close_self", remote.link.close())
        else:
            remote.update()
        for notify in self._listeners:
            notify()


class _Remote:
    """A peer on another host, and whether its last change was for better or worse."""

    def __init__(self, peer: Peer, owner: Membership) -> None:
        assert isinstance(peer.link, RemoteLink)
        self.peer = peer
        self.link = peer.link
        self._up: bool | None = None
        self._name = ""
        self.link.on_change(lambda: owner.changed(self))

    def update(self) -> None:
        """Copy what the link knows, and log `node_up` or `node_down` once per change."""
        peer, link = self.peer, self.link
        peer.last_seen, peer.failures, peer.error = link.last_seen, link.failures, link.error
        state = link.state
        up = state is not None
        if state is not None:
            peer.last = state
            self._name = state.node_id
        if up != self._up:
            self._up = up
            if up:
                log.info("node_up", address=link.address, node=self._name)
            else:
                log.warning("node_down", address=link.address, node=self._name or None, reason=link.error)
