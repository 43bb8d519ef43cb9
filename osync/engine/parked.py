"""KV caches of sequences that nobody runs, kept in plain memory: there they cost running ones nothing."""

from __future__ import annotations

import ctypes
from typing import Any


class Parked:
    """Copies of sequences by place. A state holds keys and values bit by bit, wherever its cells lie."""

    def __init__(self, api: Any, context: Any) -> None:
        self._api = api
        self._context = context
        self._states: dict[int, tuple[Any, int]] = {}

    def save(self, sequence: int, place: int, length: int) -> None:
        """Keep the whole sequence, which has `length` tokens, at `place`; without memory for it, nothing is there."""
        self._states.pop(place, None)
        size = self._api.llama_state_seq_get_size(self._context, sequence)
        try:
            buffer = (ctypes.c_uint8 * size)()
        except MemoryError:
            return
        if size and self._api.llama_state_seq_get_data(self._context, buffer, size, sequence) == size:
            self._states[place] = buffer, length

    def load(self, place: int, sequence: int) -> int:
        """Make the sequence what is at `place`; return its length, 0 where nothing is or the cache has no room."""
        buffer, length = self._states.get(place, (None, 0))
        if buffer is None:
            return 0
        read = self._api.llama_state_seq_set_data(self._context, buffer, len(buffer), sequence)
        return length if read == len(buffer) else 0

    def drop(self, place: int) -> None:
        """Forget what is at `place`."""
        self._states.pop(place, None)

    def clear(self) -> None:
        """Forget everything."""
        self._states.clear()
