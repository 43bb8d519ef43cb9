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
    drawn: int = 0
    """Tokens that were sampled for it before, on stages that are gone."""


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
    """Make the first `length` tokens of `source`'s KV cache those of `target`, replacing what it had.

    One of them may be a place where sequences are only kept; what is copied there is kept whole.
    """

    source: int
    target: int
    length: int


Operation = Open | Close | Truncate | Copy


SAMPLED = -1
"""In place of the first token of `Rows`: the one that was sampled last for the sequence, in a frame before. For
stages that know it sooner than who sends them frames (`Limits.runs_ahead`)."""


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

    def sequences(self, limit: int) -> list[int]:
        """Return those of the first `limit` sequences that have rows, or whose KV cache an operation changes."""
        changed = {rows.sequence for rows in self.rows}
        for operation in self.operations:
            match operation:
                case Open(sequence) | Truncate(sequence):
                    changed.add(sequence)
                case Copy(_, target):
                    changed.add(target)
        return sorted(sequence for sequence in changed if sequence < limit)


@dataclass(frozen=True, slots=True)
class Outcome:
    """What an evaluation gave."""

    sampled: Mapping[int, tuple[int, ...]]
    """Token ids by sequence."""
    undone: Mapping[int, int] | None = None
    """Set where no row counts, because the evaluation was aborted, a cache could not be cut, or rows do not follow
    on what is there (what was sent after an undone frame): what each sequence of the frame has in its KV cache
    now. Nothing was sampled; operations were applied."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What a stage takes at most."""

    sequences: int
    context_length: int
    n_batch: int
    sampled: int
    vocabulary_size: int
    depth: int = 1
    """Frames in flight: as many as can be worked on at once."""
    kept: int = 0
    """Sequences with the next numbers that are never evaluated, only copied to and from, and dropped by Truncate."""
    kept_tokens: int = 0
    """What these may hold together; whoever sends frames sees to it."""
    cuts: bool = True
    """False where a KV cache is kept whole or not at all."""
    runs_ahead: bool = False
    """True if rows may begin with `SAMPLED`."""
