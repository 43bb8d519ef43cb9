"""llama_batch over arrays that are made once."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

from osync.engine.frame import Rows


class Batch:
    """Room for `size` rows: of tokens, or of `width` f32 each."""

    def __init__(self, api: Any, *, size: int, sequences: int, width: int = 0) -> None:
        self.count = 0
        self.order: tuple[int, ...] = ()
        """The sequences in it, where each has one row and that is sampled."""
        self._width = width
        self._tokens = (ctypes.c_int32 * (0 if width else size))()
        self._activations = (ctypes.c_float * (size * width))()
        self._positions = (ctypes.c_int32 * size)()
        self._logits = (ctypes.c_int8 * size)()
        self._one = (ctypes.c_int32 * size)(*[1] * size)
        self._ids = [(ctypes.c_int32 * 1)(sequence) for sequence in range(sequences)]
        pointer = ctypes.POINTER(ctypes.c_int32)
        self._id_pointers = [ctypes.cast(array, pointer) for array in self._ids]
        self._sequences = (pointer * size)()
        self._batch = api.llama_batch(
            n_tokens=0,
            token=None if width else ctypes.cast(self._tokens, pointer),
            embd=ctypes.cast(self._activations, ctypes.POINTER(ctypes.c_float)) if width else None,
            pos=ctypes.cast(self._positions, pointer),
            n_seq_id=ctypes.cast(self._one, pointer),
            seq_id=ctypes.cast(self._sequences, ctypes.POINTER(pointer)),
            logits=ctypes.cast(self._logits, ctypes.POINTER(ctypes.c_int8)),
        )
        self.activations = memoryview(self._activations).cast("B")
        """Bytes of all rows' f32, to be written before `fill`."""

    def fill(self, all_rows: Sequence[Rows], every_output: bool = False) -> Any:
        """Write checked rows into the batch and return it; with `every_output`, all of them give a result."""
        start = 0
        for rows in all_rows:
            count = len(rows.tokens)
            end = start + count
            if not self._width:
                self._tokens[start:end] = list(rows.tokens)
            self._positions[start:end] = list(range(rows.position, rows.position + count))
            wanted = count if every_output else rows.sample
            self._logits[start:end] = list(bytes(count - wanted) + b"\1" * wanted)
            identity = self._id_pointers[rows.sequence]
            for index in range(start, end):
                self._sequences[index] = identity
            start = end
        self.count = self._batch.n_tokens = start
        is_step = not self._width and all(len(rows.tokens) == rows.sample == 1 for rows in all_rows)
        self.order = tuple(rows.sequence for rows in all_rows) if is_step else ()
        return self._batch

    def step(self, tokens: Sequence[int]) -> Any:
        """Move each sequence of `order` on by one token, and return the batch."""
        for index, token in enumerate(tokens):
            self._tokens[index] = token
            self._positions[index] += 1
        return self._batch
