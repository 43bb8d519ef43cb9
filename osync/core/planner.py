"""Where to cut a model over shards: the fastest plan that fits, with its reason in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from math import inf

from osync.core.plan import (
    Alternative,
    Network,
    NoPlan,
    Plan,
    Shape,
    Shard,
    Stage,
    Wish,
    gib,
    milliseconds,
)
from osync.core.plan_search import Cuts, Search

HEADER = ("stage", "shard", "layers", "weights", "KV cache", "compute", "to the next")


def make_plan(shape: Shape, shards: Sequence[Shard], network: Network, wish: Wish) -> Plan | NoPlan:
    """Cut a model over shards as `wish` asks. Ids are unique; the order of `shards` decides between equals."""
    counts = (len(shape.layers), wish.context, wish.sequences, wish.min_stages)
    if min(counts) < 1 or (wish.max_stages is not None and wish.max_stages < wish.min_stages):
        raise ValueError("a plan needs layers, a context, a sequence and a stage at least")
    chosen = [shard for shard in shards if not shard.is_excluded and (wish.shards is None or shard.id in wish.shards)]
    for priority in sorted({shard.priority for shard in chosen}, reverse=True):
        usable = [shard for shard in chosen if shard.priority >= priority]
        if plan := _plan(shape, usable, network, wish):
            return plan
    return _no_plan(shape, chosen, wish)


def best_whole(shape: Shape, hosts: Sequence[Shard], wish: Wish) -> tuple[Shard, float] | None:
    """Return the host that answers fastest with the whole model in its memory, and its time for a token."""
    need = shape.weight_bytes + shape.kv_bytes(wish.tokens)
    seconds = {host.id: whole_s(shape, host) for host in hosts if host.room >= need and not host.is_excluded}
    fitting = [host for host in hosts if host.id in seconds]
    if not fitting:
        return None
    best = min(fitting, key=lambda host: seconds[host.id])
    return best, seconds[best.id]


def whole_s(shape: Shape, host: Shard) -> float:
    """Return the time for a token on one host that holds the whole model."""
    return host.s_per_byte * shape.work_before[-1] + host.output_rate * shape.output_bytes


def explain(plan: Plan) -> list[tuple[str, ...]]:
    """Return the plan as rows of a table under HEADER; the last row sums up."""
    rows: list[tuple[str, ...]] = [
        (str(number), stage.shard, f"{stage.first}-{stage.last - 1}", gib(stage.weight_bytes), gib(stage.kv_bytes),
         milliseconds(stage.predicted_s), milliseconds(stage.hop_s))
        for number, stage in enumerate(plan.stages)
    ]  # fmt: skip
    layers = plan.stages[-1].last
    weights, kv = sum(stage.weight_bytes for stage in plan.stages), sum(stage.kv_bytes for stage in plan.stages)
    compute, hops = sum(stage.predicted_s for stage in plan.stages), sum(stage.hop_s for stage in plan.stages)
    total = ("all", f"{len(plan.stages)} shards", f"{layers} layers", gib(weights), gib(kv), milliseconds(compute),
             milliseconds(hops))  # fmt: skip
    return [*rows, total]


@dataclass(frozen=True, slots=True)
class Decision:
    """How a model is served. `is_split`: by the plan. Else by `host`, or by nobody where that is empty."""

    is_split: bool
    reason: str
    host: str = ""


def when_to_split(
    shape: Shape,
    hosts: Sequence[Shard],
    plan: Plan | NoPlan,
    wish: Wish,
    *,
    requested: bool | None = None,
    allowed: bool = True,
    threshold: int = 13_000_000_000,
) -> Decision:
    """Decide between the plan and the best of the hosts that can serve whole models.

    `requested` is what the request says, `allowed` what the daemon's settings say where it says nothing.
    """
    whole = best_whole(shape, hosts, wish)
    alone = f"{whole[0].id} alone needs {milliseconds(whole[1])} a token" if whole else _fits_none(shape, hosts, wish)
    host = whole[0].id if whole else ""
    if requested is False or (requested is None and not allowed):
        by = "by the request" if requested is False else "by the settings"
        return Decision(False, f"distributed inference is forbidden {by}; {alone}", host)
    if isinstance(plan, NoPlan):
        return Decision(False, plan.reason if requested or not whole else f"{alone}; {plan.reason}", host)
    split = f"{len(plan.stages)} stages need {milliseconds(plan.token_s)} a token"
    if requested:
        return Decision(True, f"asked for; {split}", "")
    if whole is None:
        return Decision(True, f"{alone}; {split}")
    if shape.parameters < threshold:
        billions = f"{shape.parameters / 1e9:.1f} of {threshold / 1e9:.1f} billion parameters"
        return Decision(False, f"small enough to stay whole ({billions}); {alone}", host)
    if plan.token_s < whole[1]:
        return Decision(True, f"{split}, {alone}")
    return Decision(False, f"{alone}, {split}", host)


def _plan(shape: Shape, shards: Sequence[Shard], network: Network, wish: Wish) -> Plan | None:
    search = Search(shape, shards, network, wish)
    cuts = _best(search, wish, wish.min_stages, search.most)
    if cuts is None:
        return None
    others = [
        Alternative(count, search.token_s(other), search.bottleneck_s(other))
        for count in (len(cuts) - 1, len(cuts) + 1)
        if wish.min_stages <= count <= search.most and (other := _best(search, wish, count, count, beam=16))
    ]
    stages = _stages(search, cuts)
    plan = Plan(stages, wish.objective, search.token_s(cuts), search.bottleneck_s(cuts), "", tuple(others))
    return replace(plan, reason=_reason(plan, search, wish))


def _best(search: Search, wish: Wish, least: int, most: int, beam: int | None = None) -> Cuts | None:
    if least > most:
        return None
    limit_s = inf
    if wish.objective == "throughput":
        bottleneck = search.least_bottleneck(least, most)
        if bottleneck is None:
            return None
        limit_s = bottleneck
    found = search.fastest(least, most, limit_s, beam)
    return found.cuts if found else None


def _stages(search: Search, cuts: Cuts) -> tuple[Stage, ...]:
    shape, tokens = search.shape, search.wish.tokens
    stages, begin = [], 0
    for position, (index, end) in enumerate(cuts):
        first, last = search.bounds[begin], search.bounds[end]
        is_last = end == search.end
        hop = search.back[index][cuts[0][0]] if is_last else search.hop[index][cuts[position + 1][0]]
        kv = (shape.kv_before[last] - shape.kv_before[first]) * tokens
        weights = shape.weights_before[last] - shape.weights_before[first] + shape.ends(begin == 0, is_last)
        stages.append(Stage(search.shards[index].id, first, last, weights, kv, search.stage_s(index, begin, end), hop))
        begin = end
    return tuple(stages)


def _reason(plan: Plan, search: Search, wish: Wish) -> str:
    count = len(plan.stages)
    name = "stage" if count == 1 else "stages"
    if plan.objective == "throughput":
        text = f"{count} {name}: the slowest takes {milliseconds(plan.bottleneck_s)} a token"
    else:
        text = f"{count} {name}: {milliseconds(plan.token_s)} a token"
    compared = {other.stages: other for other in plan.alternatives}
    if fewer := compared.get(count - 1):
        text += f"; {count - 1} would need {_figure(plan, fewer)}"
    elif count > wish.min_stages:
        text += f"; {count - 1} cannot hold the model"
    if more := compared.get(count + 1):
        text += f"; {count + 1} would need {_figure(plan, more)}"
    elif count == wish.max_stages:
        text += "; more are not allowed"
    return text


def _figure(plan: Plan, other: Alternative) -> str:
    return milliseconds(other.bottleneck_s if plan.objective == "throughput" else other.token_s)


def _needs(shape: Shape, wish: Wish) -> str:
    weights, kv = shape.weight_bytes, shape.kv_bytes(wish.tokens)
    parts = f"{gib(weights)} weights, {gib(kv)} KV cache for {wish.sequences} x {wish.context} tokens"
    return f"needs {gib(weights + kv)} ({parts})"


def _fits_none(shape: Shape, hosts: Sequence[Shard], wish: Wish) -> str:
    largest = max((host.room for host in hosts if not host.is_excluded), default=0)
    return f"{_needs(shape, wish)} and the largest host has {gib(largest)}"


def _no_plan(shape: Shape, shards: Sequence[Shard], wish: Wish) -> NoPlan:
    needed = shape.weight_bytes + shape.kv_bytes(wish.tokens)
    lent = sum(shard.room for shard in shards)
    if not shards:
        return NoPlan(f"{_needs(shape, wish)} and no shard may be used", needed, 0)
    each = ", ".join(f"{shard.id} {gib(shard.room)}" for shard in shards)
    text = f"{_needs(shape, wish)}; {len(shards)} shards together lend {gib(lent)} ({each})"
    most = min(len(shards), len(shape.bounds) - 1, wish.max_stages or len(shards))
    if most < wish.min_stages:
        text += f"; {wish.min_stages} stages were asked for and {most} are possible"
    elif needed <= lent:
        rooms = sorted((shard.room for shard in shards), reverse=True)
        if sum(rooms[:most]) < needed:
            limit = f"{most} {'stage is' if most == 1 else 'stages are'} the most that it may have"
            text += f", the largest {most} only {gib(sum(rooms[:most]))}, and {limit}"
        else:
            text += f"; no cut between layers fits: a part of {gib(_largest_part(shape, wish))} stays whole"
    elif wish.context > 1 and shape.weight_bytes < lent:
        per_token = shape.kv_bytes(wish.sequences)
        text += f"; a context of {(lent - shape.weight_bytes) // per_token} tokens at most would fit"
    return NoPlan(text, needed, lent)


def _largest_part(shape: Shape, wish: Wish) -> int:
    bounds = shape.bounds
    return max(
        shape.weights_before[end] - shape.weights_before[begin]
        + (shape.kv_before[end] - shape.kv_before[begin]) * wish.tokens
        + shape.ends(begin == 0, end == len(shape.layers))
        for begin, end in pairwise(bounds)
    )  # fmt: skip
