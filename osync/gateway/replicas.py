"""The cluster view as the balancer's candidates, made anew only where a node's state changed."""

from __future__ import annotations

from collections.abc import Collection
from operator import is_

from osync.cluster.view import ClusterView, Peer, is_node
from osync.core.balancer import Candidate
from osync.types import LoadedModel, ModelInfo, NodeId, NodeState
from osync.wire import names


class Replicas:
    """Keeps one candidate per node."""

    def __init__(self) -> None:
        self._kept: dict[NodeId, tuple[tuple[ModelInfo, ...], tuple[LoadedModel, ...], Candidate]] = {}
        # What the lists below were made from; states are frozen, so the same object says the same.
        self._peers: list[Peer] = []
        self._states: list[NodeState | None] = []
        self._drained: frozenset[NodeId] = frozenset()
        self._candidates: list[Candidate] = []
        self._up: dict[NodeId, tuple[NodeState, Peer]] = {}

    def of(self, view: ClusterView, drained: Collection[NodeId]) -> list[Candidate]:
        """Return a candidate for each node that is up."""
        peers = view.peers
        states = [peer.link.state for peer in peers]
        if not (
            len(peers) == len(self._peers)
            and all(map(is_, states, self._states))
            and all(map(is_, peers, self._peers))
            and drained == self._drained
        ):
            self._peers, self._states, self._drained = list(peers), states, frozenset(drained)
            self._make()
        return self._candidates

    def find(self, node_id: NodeId) -> tuple[NodeState, Peer] | None:
        """Return the node of a candidate that `of` has just returned."""
        return self._up.get(node_id)

    def _make(self) -> None:
        self._up = {}
        for peer, state in zip(self._peers, self._states, strict=True):
            if state is not None and is_node(state):
                self._up.setdefault(state.node_id, (state, peer))
        self._candidates = [self._candidate(state) for state, _ in self._up.values()]
        if len(self._kept) > len(self._up) + 64:
            self._kept = {node_id: kept for node_id, kept in self._kept.items() if node_id in self._up}

    def _candidate(self, state: NodeState) -> Candidate:
        usable = state.backend.ok and not state.draining and state.node_id not in self._drained
        kept = self._kept.get(state.node_id)
        # Tuples compare their items by identity first: cheap while nothing changed.
        if (
            kept is not None
            and kept[2].usable == usable
            and kept[0] == state.backend.models
            and kept[1] == state.backend.loaded
        ):
            return kept[2]
        candidate = _candidate(state, usable)
        self._kept[state.node_id] = (state.backend.models, state.backend.loaded, candidate)
        return candidate


def _candidate(state: NodeState, usable: bool) -> Candidate:
    loaded = {names.key(model.name) for model in state.backend.loaded}
    # Names of one model share its runner, and only the one that loaded it is listed.
    digests = {model.digest for model in state.backend.loaded if model.digest}
    loaded |= {names.key(model.name) for model in state.backend.models if model.digest in digests}
    present = frozenset(names.key(model.name) for model in state.backend.models) | loaded
    return Candidate(state.node_id, state.hostname, usable, present, frozenset(loaded))
