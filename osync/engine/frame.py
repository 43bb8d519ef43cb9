"""What travels to a stage and back: rows of several sequences, and what to do before they are evaluated.

Opening a sequence and cutting its KV cache travel in the same frames as its rows, so that every stage
of a pipeline does the same at the same place in the stream.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from osync.engine.sampling import SamplingOptions


@dataclass(frozen=True, slots=True)
class Open:
    """A sequence starts: the last stage makes its sampler. Its KV cache stays as it is."""

    sequence: int
    sampling: SamplingOptions
    history: tuple[int, ...] = ()
    """Tokens before it that penalties look at."""


@dataclass(frozen=True, slots=True)
class Close:
    """A sequence ended: its sampler goes, its KV cache stays for who comes next."""

    sequence: int


@dataclass(frozen=True, slots=True)
class Truncate:
    """Keep only the first `length` tokens of a sequence's KV cache; 0 drops it."""

    sequence: int
    length: int


@dataclass(frozen=True, slots=True)
class Copy:
    """Make the first `length` tokens of `source`'s KV cache those of `target`, replacing what it had."""

    source: int
    target: int
    length: int


Operation = Open | Close | Truncate | Copy


@dataclass(frozen=True, slots=True)
class Rows:
    """Consecutive tokens of one sequence; the first is at `position`."""

    sequence: int
    position: int
    tokens: tuple[int, ...]
    sample: int = 0
    """So many of the last rows are sampled, in order, up to the first whose token is not the next row's."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One evaluation: operations first, in order, then all rows in one batch."""

    rows: tuple[Rows, ...] = ()
    operations: tuple[Operation, ...] = ()


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation gave."""

    sampled: Mapping[int, tuple[int, ...]]
    """Token ids by sequence."""
    undone: Mapping[int, int] | None = None
    """Set where no row counts, because the evaluation was aborted or a cache could not be cut: what each
    sequence of the frame has in its KV cache now. Nothing was sampled; operations were applied."""
