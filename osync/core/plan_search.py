"""The search for the best cut: dynamic programming over (first shard, shards used, last shard, layers done).

A state's successors put the next layers on a shard not used yet. Work is additive over layers, so the best beginning of
a stage that ends at a given layer is a minimum over a sliding window (memory bounds its left edge, which only moves
right): one pass per state and shard. States that cannot beat the best plan known, by a lower bound on what is left, or
whose unused shards cannot hold what is left, are dropped. With up to EXACT_SHARDS shards nothing else is dropped, and
the result is the optimum. Beyond, the states of each length are cut to the BEAM most promising ones: the number of
subsets doubles with every shard, and more than ten stages rarely pay.

The slowest stage is minimised first on its own (binary search over all values that it can have; for each, how far can
a set of shards reach at most), then the time per token with that bound: doing both at once would not be exact.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

from osync.core.plan import Network, Shape, Shard, Wish

EXACT_SHARDS = 10
BEAM = 32
_SLACK = 1 + 1e-9

Cuts = tuple[tuple[int, int], ...]
"""Shard index and end (as an index into `bounds`) of each stage, in order."""


@dataclass(frozen=True, slots=True)
class Found:
    """The best cut and its time per token."""

    cuts: Cuts
    token_s: float


@dataclass(slots=True)
class _Reach:
    """A state: for each bound that it ends at, the least time until there, and where its last stage began and why."""

    first: int
    mask: int
    last: int
    costs: dict[int, float]
    parents: dict[int, tuple[_Reach, int] | None]
    promise: float = inf


class Search:
    """One model on given shards. Bounds are indices into `shape.bounds`; shards are indices into `shards`."""

    def __init__(self, shape: Shape, shards: Sequence[Shard], network: Network, wish: Wish) -> None:
        self.shape, self.shards, self.wish = shape, shards, wish
        self.bounds = shape.bounds
        self.end = len(self.bounds) - 1
        self.work = [shape.work_before[bound] for bound in self.bounds]
        tokens = wish.tokens
        self.held = [shape.weights_before[bound] + shape.kv_before[bound] * tokens for bound in self.bounds]
        every = range(len(shards))
        links = [[network.link(shards[a].id, shards[b].id) for b in every] for a in every]
        self.transfer = [[wish.activation_bytes / links[a][b].bytes_per_s for b in every] for a in every]
        self.hop = [[links[a][b].hop_s(wish.activation_bytes) for b in every] for a in every]
        self.back = [[links[a][b].round_trip_s / 2 for b in every] for a in every]
        if wish.relay is not None:
            way = [network.link(shard.id, wish.relay).round_trip_s / 2 for shard in shards]
            self.back = [[way[a] + way[b] for b in every] for a in every]
        self.output_s = [shape.output_bytes * shard.output_rate for shard in shards]
        most = len(shards) if wish.max_stages is None else wish.max_stages
        self.most = min(most, len(shards), self.end)
        self._window_cache: dict[float, list[list[int]]] = {}

    def stage_s(self, shard: int, begin: int, end: int) -> float:
        """Return the predicted time of one stage."""
        seconds = self.shards[shard].s_per_byte * (self.work[end] - self.work[begin]) + self.wish.overhead_s
        return seconds + self.output_s[shard] if end == self.end else seconds

    def stage_bytes(self, begin: int, end: int) -> int:
        """Return what one stage holds."""
        return self.held[end] - self.held[begin] + self.shape.ends(begin == 0, end == self.end)

    def token_s(self, cuts: Cuts) -> float:
        """Return one stream's time for a token."""
        total, begin, previous = 0.0, 0, -1
        for shard, end in cuts:
            total += self.stage_s(shard, begin, end) + (self.hop[previous][shard] if previous >= 0 else 0.0)
            begin, previous = end, shard
        return total + self.back[previous][cuts[0][0]]

    def bottleneck_s(self, cuts: Cuts) -> float:
        """Return the time of the slowest stage or link."""
        slowest, begin, previous = 0.0, 0, -1
        for shard, end in cuts:
            slowest = max(slowest, self.stage_s(shard, begin, end))
            if previous >= 0:
                slowest = max(slowest, self.transfer[previous][shard])
            begin, previous = end, shard
        return slowest

    def fastest(self, least: int, most: int, limit_s: float = inf, beam: int | None = None) -> Found | None:
        """Return the least time per token with `least` to `most` stages, each stage and link within `limit_s`."""
        beam = BEAM if len(self.shards) > EXACT_SHARDS and beam is None else beam
        best = self._search(least, most, limit_s, None, min(beam or inf, 16))
        # The reach goes by memory and cannot miss where the beam, which goes by time, does.
        if best is None and beam is not None and (cuts := self._reach(least, most, limit_s)):
            best = Found(cuts, self.token_s(cuts))
        return self._search(least, most, limit_s, best, inf if beam is None else beam)

    def least_bottleneck(self, least: int, most: int) -> float | None:
        """Return the shortest that the slowest stage can be; None where no cut fits."""
        if self._reach(least, most, inf) is None:
            return None
        values = {
            self.stage_s(shard, begin, end)
            for shard in self._kinds()
            for end in range(1, self.end + 1)
            for begin in range(end)
        }
        values.update(transfer for row in self.transfer for transfer in row)
        ordered = sorted(values)
        low, high = 0, len(ordered) - 1
        while low < high:
            middle = (low + high) // 2
            if self._reach(least, most, ordered[middle]) is None:
                low = middle + 1
            else:
                high = middle
        return ordered[low]

    def _kinds(self) -> Iterable[int]:
        """Yield one shard of each speed."""
        return {(s.s_per_byte, s.output_rate): index for index, s in enumerate(self.shards)}.values()

    def _windows(self, limit_s: float) -> list[list[int]]:
        """Return, for each shard and end, the first bound that a later stage may begin with."""
        found = self._window_cache.get(limit_s)
        if found is None:
            found = self._window_cache[limit_s] = [self._window(shard, limit_s) for shard in range(len(self.shards))]
        return found

    def _window(self, index: int, limit_s: float) -> list[int]:
        room = self.shards[index].room
        starts, begin = [0], 0
        for end in range(1, self.end + 1):
            while begin < end and not self._fits(index, begin, end, room, limit_s):
                begin += 1
            starts.append(begin)
        return starts

    def _fits(self, index: int, begin: int, end: int, room: int, limit_s: float) -> bool:
        held = self.held[end] - self.held[begin] + self.shape.ends(False, end == self.end)
        return held <= room and self.stage_s(index, begin, end) <= limit_s * _SLACK

    def _first_ends(self, index: int, limit_s: float) -> list[int]:
        """Return where a first stage on a shard may end."""
        room = self.shards[index].room
        return [
            end
            for end in range(1, self.end + 1)
            if self.stage_bytes(0, end) <= room and self.stage_s(index, 0, end) <= limit_s * _SLACK
        ]

    def _reach(self, least: int, most: int, limit_s: float) -> Cuts | None:
        """Return any cut within `limit_s`: going as far as possible is never worse, whatever comes later."""
        starts = self._windows(limit_s)
        slow_link = any(transfer > limit_s * _SLACK for row in self.transfer for transfer in row)
        level: dict[tuple[int, int], tuple[int, Cuts]] = {}
        for index in range(len(self.shards)):
            if ends := [end for end in self._first_ends(index, limit_s) if self._may_end(end, 1, least)]:
                level[1 << index, index if slow_link else -1] = max(ends), ((index, max(ends)),)
        for count in range(1, most + 1):
            for end, cuts in level.values():
                if end == self.end and count >= least:
                    return cuts
            following: dict[tuple[int, int], tuple[int, Cuts]] = {}
            for (mask, _), (end, cuts) in self._farthest(level):
                for index in range(len(self.shards)):
                    if mask >> index & 1 or (slow_link and self.transfer[cuts[-1][0]][index] > limit_s * _SLACK):
                        continue
                    # The last end whose window begins at or before `end`; the windows only move right.
                    farthest = bisect_right(starts[index], end) - 1
                    if least > count + 1:
                        farthest = min(farthest, self.end - (least - count - 1))
                    if farthest <= end:
                        continue
                    key = mask | 1 << index, index if slow_link else -1
                    if key not in following or following[key][0] < farthest:
                        following[key] = farthest, (*cuts, (index, farthest))
            level = following
        return None

    def _farthest(
        self, level: Mapping[tuple[int, int], tuple[int, Cuts]]
    ) -> Iterable[tuple[tuple[int, int], tuple[int, Cuts]]]:
        if len(self.shards) <= EXACT_SHARDS or len(level) <= BEAM:
            return level.items()
        return sorted(level.items(), key=lambda item: -item[1][0])[:BEAM]

    def _may_end(self, end: int, count: int, least: int) -> bool:
        """Return False if too few layers would be left for the stages that there must still be."""
        return self.end - end >= least - count

    def _search(self, least: int, most: int, limit_s: float, best: Found | None, beam: float) -> Found | None:
        starts = self._windows(limit_s)
        bound = _Bound(self, most, limit_s)
        limit = best.token_s if best else inf
        level: list[_Reach] = []
        for index in range(len(self.shards)):
            costs = {
                end: self.stage_s(index, 0, end)
                for end in self._first_ends(index, limit_s)
                if self._may_end(end, 1, least)
            }
            level.append(_Reach(index, 1 << index, index, costs, dict.fromkeys(costs)))
        for count in range(1, most + 1):
            for state in level:
                total = state.costs.pop(self.end, inf) + self.back[state.last][state.first]
                if count >= least and total < limit:
                    limit, best = total, Found(_trace(state, self.end), total)
            if count == most:
                break
            bound.prune(level, count, limit)
            level = [state for state in level if state.costs]
            if len(level) > beam:
                level = sorted(level, key=lambda state: state.promise)[: int(beam)]
            level = [
                reach
                for (first, mask), group in _grouped(level).items()
                for index in range(len(self.shards))
                if not mask >> index & 1
                and (reach := self._extend(first, mask, group, index, starts[index], limit_s, least - count - 1)).costs
            ]
        return best

    def _extend(
        self,
        first: int,
        mask: int,
        group: Sequence[_Reach],
        index: int,
        starts: Sequence[int],
        limit_s: float,
        need: int,
    ) -> _Reach:
        """Put a stage on shard `index` behind any state of `group`: the best beginning for each end, in one pass."""
        shard = self.shards[index]
        begins: dict[int, tuple[float, _Reach]] = {}
        for state in group:
            if self.transfer[state.last][index] > limit_s * _SLACK:
                continue
            hop = self.hop[state.last][index]
            for begin, cost in state.costs.items():
                if begin not in begins or cost + hop < begins[begin][0]:
                    begins[begin] = cost + hop, state
        costs: dict[int, float] = {}
        parents: dict[int, tuple[_Reach, int] | None] = {}
        ordered = sorted(begins)
        waiting: deque[tuple[float, int]] = deque()
        added = 0
        for end in range(ordered[0] + 1 if ordered else self.end + 1, self.end + 1 - max(need, 0)):
            while added < len(ordered) and ordered[added] < end:
                begin = ordered[added]
                value = begins[begin][0] - shard.s_per_byte * self.work[begin]
                while waiting and waiting[-1][0] >= value:
                    waiting.pop()
                waiting.append((value, begin))
                added += 1
            while waiting and waiting[0][1] < starts[end]:
                waiting.popleft()
            if waiting:
                begin = waiting[0][1]
                cost, state = begins[begin]
                costs[end] = cost + self.stage_s(index, begin, end)
                parents[end] = state, begin
        return _Reach(first, mask | 1 << index, index, costs, parents)


class _Bound:
    """Which states cannot become the best, and which cannot become a plan at all."""

    def __init__(self, search: Search, most: int, limit_s: float) -> None:
        self._search, self._most, self._limit_s = search, most, limit_s
        every = range(len(search.shards))
        self._hops = [_span(search.hop[a][b] for b in every if b != a) for a in every]
        self._backs = [_span(search.back[a][b] for a in every if a != b) for b in every]
        self._step = min(low for low, _ in self._hops) + search.wish.overhead_s
        self._output = min(search.output_s)
        layers = search.shape.layers
        tokens = search.wish.tokens
        held = ((layer.work, layer.weight_bytes + layer.kv_bytes_per_token * tokens) for layer in layers)
        self._density = min((work / size for work, size in held if size), default=0.0)
        self._left: dict[int, tuple[list[int], list[float], list[float], float]] = {}

    def prune(self, states: Iterable[_Reach], count: int, limit: float) -> None:
        """Drop the ends of states that lead nowhere, and set the least total that those left may come to.

        Among states with the same shards used and the same end, one that is ahead by more than any links that
        follow could make up for rules the others out: on an even network one of them is left.
        """
        search = self._search
        links_are_alike = all(transfer <= self._limit_s for row in search.transfer for transfer in row)
        ahead: dict[tuple[int, int], tuple[float, _Reach]] = {}
        for state in states:
            least = self._least(state, count, limit)
            low, high = self._backs[state.first][0], self._hops[state.last][1] + self._backs[state.first][1]
            state.promise = least + low
            for end, cost in state.costs.items() if links_are_alike else ():
                if (state.mask, end) not in ahead or cost + high < ahead[state.mask, end][0]:
                    ahead[state.mask, end] = cost + high, state
        for state in states if links_are_alike else ():
            low = self._hops[state.last][0] + self._backs[state.first][0]
            for end, cost in list(state.costs.items()):
                worst, best = ahead[state.mask, end]
                if best is not state and cost + low >= worst:
                    del state.costs[end]

    def _least(self, state: _Reach, count: int, limit: float) -> float:
        search = self._search
        if state.mask not in self._left:
            self._left[state.mask] = self._what_is_left(state.mask, count)
        largest, rooms, seconds, rate = self._left[state.mask]
        least, back = inf, self._backs[state.first][0]
        whole = search.held[-1] + search.shape.output_bytes
        for end, cost in list(state.costs.items()):
            stages = max(1, bisect_left(largest, whole - search.held[end]))
            need = search.held[-1] - search.held[end]
            fill = bisect_left(rooms, need * (1 - 1e-9))
            if stages >= len(largest) or fill >= len(rooms):
                del state.costs[end]
                continue
            compute = rate * (search.work[-1] - search.work[end])
            if fill:
                share = min(1.0, (need - rooms[fill - 1]) / (rooms[fill] - rooms[fill - 1]))
                filled = seconds[fill - 1] + share * (seconds[fill] - seconds[fill - 1])
                compute = max(compute, filled * (1 - 1e-9))
            total = cost + compute + stages * self._step + self._output
            if total + back >= limit:
                del state.costs[end]
            else:
                least = min(least, total)
        return least

    def _what_is_left(self, mask: int, count: int) -> tuple[list[int], list[float], list[float], float]:
        """Return what unused shards hold: the largest first, then the fastest first with the seconds that they take."""
        unused = [shard for index, shard in enumerate(self._search.shards) if not mask >> index & 1]
        largest = sorted((shard.room for shard in unused), reverse=True)[: self._most - count]
        rooms, seconds = [0.0], [0.0]
        for shard in sorted(unused, key=lambda shard: shard.s_per_byte):
            per_byte = shard.s_per_byte * self._density
            room: float = shard.room
            if per_byte and self._limit_s < inf:
                room = min(room, max(0.0, self._limit_s * _SLACK - self._search.wish.overhead_s) / per_byte)
            if room:
                rooms.append(rooms[-1] + room)
                seconds.append(seconds[-1] + room * per_byte)
        rate = min((shard.s_per_byte for shard in unused), default=inf)
        return list(accumulate(largest, initial=0)), rooms, seconds, rate


def _span(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return (min(found), max(found)) if found else (0.0, 0.0)


def _grouped(level: Iterable[_Reach]) -> dict[tuple[int, int], list[_Reach]]:
    groups: dict[tuple[int, int], list[_Reach]] = {}
    for state in level:
        groups.setdefault((state.first, state.mask), []).append(state)
    return groups


def _trace(state: _Reach, end: int) -> Cuts:
    cuts: list[tuple[int, int]] = []
    while True:
        cuts.append((state.last, end))
        parent = state.parents[end]
        if parent is None:
            return tuple(reversed(cuts))
        state, end = parent
