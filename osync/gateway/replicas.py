"""The cluster view as the balancer's candidates, made anew only where a node's models changed."""

from __future__ import annotations

from collections.abc import Collection

from osync.cluster.view import ClusterView
from osync.core.balancer import Candidate
from osync.types import LoadedModel, ModelInfo, NodeId, NodeState
from osync.wire import names


class Replicas:
    """Keeps one candidate per node."""

    def __init__(self) -> None:
        self._kept: dict[NodeId, tuple[tuple[ModelInfo, ...], tuple[LoadedModel, ...], Candidate]] = {}

    def of(self, view: ClusterView, drained: Collection[NodeId]) -> list[Candidate]:
        """Return a candidate for each node that is up."""
        candidates = []
        for state, peer in view.up():
            usable = peer.usable and state.node_id not in drained
            kept = self._kept.get(state.node_id)
            # Tuples compare their items by identity first: cheap while nothing changed.
            if (
                kept is not None
                and kept[2].usable == usable
                and kept[0] == state.backend.models
                and kept[1] == state.backend.loaded
            ):
                candidates.append(kept[2])
                continue
            candidate = _candidate(state, usable)
            self._kept[state.node_id] = (state.backend.models, state.backend.loaded, candidate)
            candidates.append(candidate)
        if len(self._kept) > len(candidates) + 64:
            up = {candidate.node_id for candidate in candidates}
            self._kept = {node_id: kept for node_id, kept in self._kept.items() if node_id in up}
        return candidates


def _candidate(state: NodeState, usable: bool) -> Candidate:
    loaded = {names.key(model.name) for model in state.backend.loaded}
    # Names of one model share its runner, and only the one that loaded it is listed.
    digests = {model.digest for model in state.backend.loaded if model.digest}
    loaded |= {names.key(model.name) for model in state.backend.models if model.digest in digests}
    present = frozenset(names.key(model.name) for model in state.backend.models) | loaded
    return Candidate(state.node_id, state.hostname, usable, present, frozenset(loaded))
