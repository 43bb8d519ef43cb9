"""How many layers of a model fit on the accelerators of a host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Offload:
    """Where a model's layers go. Devices are indices into the list that was asked about."""

    layers: int
    """As llama.cpp counts them: the output layer first, then the last layers; all: one more than the model has."""
    devices: tuple[int, ...]


def plan(
    layers: Sequence[int],
    output: int,
    free: Sequence[int],
    *,
    reserve: int,
    wanted: int = -1,
    main: int = -1,
    spread: bool = False,
) -> Offload:
    """Place as many layers as fit: all on one device if it can be, else over several.

    `layers` are the bytes of each layer with its KV cache, `output` those of the output layer, `free` the
    devices' bytes, of which each keeps `reserve` (compute buffers). `wanted` >= 0 is taken as it is.
    `main` >= 0 names the one device to use; `spread` uses all of them in any case.
    """
    room = [max(0, bytes_ - reserve) for bytes_ in free]
    candidates = [main] if main >= 0 else sorted(range(len(free)), key=lambda i: (-room[i], i))
    if not candidates or wanted == 0:
        return Offload(0, ())
    best = candidates[0]
    on_best = count_fitting(layers, output, [room[best]])
    if main >= 0 or len(candidates) == 1:
        return _offload(on_best if wanted < 0 else min(wanted, len(layers) + 1), (best,))
    goal = len(layers) + 1 if wanted < 0 else min(wanted, len(layers) + 1)
    if on_best >= goal and not spread:
        return _offload(goal, (best,))
    together = count_fitting(layers, output, room)
    used = tuple(sorted(i for i in candidates if room[i] > 0))
    if wanted >= 0:
        return _offload(goal, used or (best,))
    if together > on_best or spread:
        return _offload(together, used)
    return _offload(on_best, (best,))


def _offload(layers: int, devices: tuple[int, ...]) -> Offload:
    return Offload(layers, devices if layers else ())


def count_fitting(layers: Sequence[int], output: int, room: Sequence[int]) -> int:
    """Count the layers that fit into the devices together, output layer first, then from the last one back.

    llama.cpp cuts between layers by the devices' shares of the memory, so each device after the first may
    lose up to one layer to the cut.
    """
    used = [bytes_ for bytes_ in room if bytes_ > 0]
    if not used:
        return 0
    total = sum(used) - (len(used) - 1) * max((*layers, output), default=0)
    count = need = 0
    for size in (output, *reversed(layers)):
        need += size
        if need > total:
            break
        count += 1
    return count
