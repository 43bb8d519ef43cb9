"""The embedding of tokens that a slice carries behind its tensors: rows of it, as f32."""

from __future__ import annotations

import ctypes
import math
import os
from collections.abc import Sequence
from pathlib import Path

from osync.engine.gguf import TENSOR_TYPES
from osync.engine.tap import ggml
from osync.errors import ModelUnusable, NotSupported


class _Traits(ctypes.Structure):
    """The beginning of struct ggml_type_traits."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleave", ctypes.c_int64),
        ("block_bytes", ctypes.c_size_t),
        ("is_quantized", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    ]


_ToFloat = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
_F32 = 0


class TokenTable:
    """Looks up rows with ggml's own conversion, so that they have the bits that llama.cpp would give them."""

    def __init__(self, path: Path, *, kind: int, offset: int, rows: int, width: int, scaled: bool) -> None:
        """Open the file; `kind` is ggml's number of the type. Raises NotSupported, ModelUnusable."""
        label, block, block_bytes = TENSOR_TYPES[kind]
        self.rows = rows
        self._width, self._offset = width, offset
        self._row_bytes = width // block * block_bytes
        self._scale = ctypes.c_float(math.sqrt(width)).value if scaled else 0.0
        self._convert = None
        if kind != _F32:
            traits = _Traits.from_address(ggml().ggml_get_type_traits(kind))
            if (traits.block, traits.block_bytes) != (block, block_bytes) or not traits.to_float:
                raise NotSupported(f"this llama.cpp cannot read embeddings of the type {label}")
            self._convert = _ToFloat(traits.to_float)
        self._row = ctypes.create_string_buffer(self._row_bytes)
        self._file = os.open(path, os.O_RDONLY)
        if os.fstat(self._file).st_size < offset + rows * self._row_bytes:
            os.close(self._file)
            raise ModelUnusable(f"{path.name} is truncated: it ends within the embedding of tokens")

    def fill(self, tokens: Sequence[int], target: memoryview) -> None:
        """Write the rows of checked tokens into `target`, one after the other. Raises ModelUnusable."""
        import numpy as np

        step = self._width * 4
        place = (ctypes.c_char * (len(tokens) * step)).from_buffer(target)
        address, source = ctypes.addressof(place), ctypes.addressof(self._row)
        for token in tokens:
            read = os.preadv(self._file, [self._row], self._offset + token * self._row_bytes)
            if read != self._row_bytes:
                raise ModelUnusable("the file with the embedding of tokens became shorter while it was read")
            if self._convert is None:
                ctypes.memmove(address, source, step)
            else:
                self._convert(source, address, self._width)
            address += step
        if self._scale:
            values = np.frombuffer(target[: len(tokens) * step], np.float32)
            np.multiply(values, np.float32(self._scale), out=values)

    def close(self) -> None:
        """Close the file."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1
