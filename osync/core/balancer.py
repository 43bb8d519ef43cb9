"""Which node gets a request: a pure choice among candidates, with its reason.

Filter (usable, has the model, not tried yet), then loaded before present, then fewest of this
proxy's own requests in flight, then by lot.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal, Protocol

from osync.types import NodeId


class Rng(Protocol):
    """What a choice by lot needs."""

    def random(self) -> float:
        """Return a float in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Candidate:
    """One node that is up. Names are in the form to compare by."""

    node_id: NodeId
    hostname: str = ""
    usable: bool = True
    """Its backend answers, and it is not draining."""
    present: frozenset[str] = frozenset()
    loaded: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True)
class Choice:
    """The node to ask, and why it."""

    node_id: NodeId
    reason: str


@dataclass(frozen=True, slots=True)
class Miss:
    """Nobody to ask. `unusable`: replicas are up, and none may get requests. `tried`: all have failed."""

    why: Literal["no_nodes", "no_model", "unusable", "tried", "no_such_node"]


def pick(
    candidates: Iterable[Candidate],
    model: str,
    in_flight: Mapping[NodeId, int],
    *,
    excluded: Collection[NodeId] = (),
    pin: str = "",
    rng: Rng,
) -> Choice | Miss:
    """Choose a replica of `model`. `pin` names the one node, by id or host name, that may get it."""
    if pin:
        return _pinned(candidates, pin, excluded)
    usable = has_model = waits = False
    best: list[NodeId] = []
    best_rank = (2, 0)
    for candidate in candidates:
        if not candidate.usable:
            waits = waits or model in candidate.present
            continue
        usable = True
        if model not in candidate.present:
            continue
        has_model = True
        if candidate.node_id in excluded:
            continue
        rank = (0 if model in candidate.loaded else 1, in_flight.get(candidate.node_id, 0))
        if rank < best_rank:
            best, best_rank = [candidate.node_id], rank
        elif rank == best_rank:
            best.append(candidate.node_id)
    if not best:
        if has_model:
            return Miss("tried")
        return Miss("unusable" if waits else "no_model" if usable else "no_nodes")
    node_id = best[0] if len(best) == 1 else best[int(rng.random() * len(best))]
    where = "loaded" if best_rank[0] == 0 else "present"
    lot = f", one of {len(best)} alike" if len(best) > 1 else ""
    return Choice(node_id, f"{where}, {best_rank[1]} in flight{lot}")


def ask_around(candidates: Iterable[Candidate], excluded: Collection[NodeId] = ()) -> Choice | Miss:
    """Choose a node to ask for a model that none reports: it may be seconds old, or there and broken."""
    for candidate in candidates:
        if candidate.usable and candidate.node_id not in excluded:
            return Choice(candidate.node_id, "asked, though no node reports the model")
    return Miss("no_model")


def _pinned(candidates: Iterable[Candidate], pin: str, excluded: Collection[NodeId]) -> Choice | Miss:
    for candidate in candidates:
        if pin in (candidate.node_id, candidate.hostname):
            return Miss("tried") if candidate.node_id in excluded else Choice(candidate.node_id, "pinned")
    return Miss("no_such_node")
