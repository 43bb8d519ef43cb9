"""How fast this host evaluates: a guess before any stage was loaded, then what stages really took."""

from __future__ import annotations

import time
from typing import Final

_ROWS: Final = 512
_WIDTH: Final = 4096
_WINDOWS: Final = 6
_WINDOW_S: Final = 0.06
"""Long enough for a CPU quota to show, short enough that one of them meets nobody else."""
_PAUSE_S: Final = 0.05
_SCALING: Final = 0.8
"""Twice the threads are 2 ** 0.8 times as fast, about: they share the memory."""
_QUANTIZED: Final = 4.0
"""Seconds a byte of quantized weights against a byte of float32: less memory to read, more work a byte."""


def measure(threads: int) -> float:
    """Return seconds per byte of weights for one token with so many threads; blocks two thirds of a second.

    Products of matrix and vector in one thread; the best of several windows, since who starts together disturbs each
    other, and unequal guesses for equal hosts make lopsided plans.
    """
    import numpy as np

    matrix = np.ones((_ROWS, _WIDTH), np.float32)
    vector = np.ones(_WIDTH, np.float32)
    best = float("inf")
    for _ in range(_WINDOWS):
        began, count = time.monotonic(), 0
        while (took := time.monotonic() - began) < _WINDOW_S:
            np.einsum("ij,j->i", matrix, vector)
            count += 1
        best = min(best, took / count)
        time.sleep(_PAUSE_S)
    guess: float = best / matrix.nbytes * _QUANTIZED / threads**_SCALING
    return guess


class Speed:
    """Seconds per byte of weights, corrected by what evaluations of one row took."""

    def __init__(self, guess: float) -> None:
        self.s_per_byte = guess
        self._is_measured = False

    def learn(self, weight_bytes: int, decode_s: float) -> None:
        """Take the mean time of an evaluation of one row by a stage of so many bytes."""
        if weight_bytes <= 0 or decode_s <= 0:
            return
        seen = decode_s / weight_bytes
        self.s_per_byte = seen if not self._is_measured else 0.8 * self.s_per_byte + 0.2 * seen
        self._is_measured = True
