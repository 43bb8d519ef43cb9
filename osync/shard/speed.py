"""How fast this host evaluates: a guess before any stage was loaded, then what stages really took."""

from __future__ import annotations

import time
from typing import Final

_ROWS: Final = 2048
_WIDTH: Final = 4096
_LEAST_S: Final = 0.15
_QUANTIZED: Final = 2.0
"""Seconds a byte of quantized weights against a byte of float32: less memory to read, more work a byte."""


def measure() -> float:
    """Return seconds per byte of weights for one token, by products of matrix and vector; blocks some tenths of one."""
    import numpy as np

    matrix = np.ones((_ROWS, _WIDTH), np.float32)
    vector = np.ones(_WIDTH, np.float32)
    matrix @ vector
    best = float("inf")
    until = time.monotonic() + _LEAST_S
    while (began := time.monotonic()) < until:
        matrix @ vector
        best = min(best, time.monotonic() - began)
    return best / matrix.nbytes * _QUANTIZED


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
