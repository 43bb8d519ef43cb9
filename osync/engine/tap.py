"""Reads the residual stream as it leaves a context's last layer, and ends the evaluation there.

llama.cpp asks `cb_eval` of each node of its graph whether it is wanted, computes up to the wanted one, and calls
again to have it read; answered "no" then, it leaves the rest out. That is hundreds of calls a token, each of which
would wait for the GIL. Where the machine is known (x86-64 Linux, nothing but the CPU) some bytes of machine code
answer instead, and the tensor is read after the evaluation; elsewhere a Python closure does.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import sys
from functools import cache
from typing import Any

from osync.engine.llama import library
from osync.errors import ModelError

_WORD = 8
_WANTED, _MASK, _TAIL, _FOUND = range(4)
"""Of `_words`: the name's first 8 bytes, which of the next 8 count, those, and the tensor that was found."""


@cache
def ggml() -> Any:
    """Return the functions of ggml that are used here, from the libraries that libllama is linked to."""
    library()
    from llama_cpp.llama_cpp import _lib

    linked = ctypes.CDLL(_lib._name)  # a handle of its own: signatures set here are nobody else's
    linked.ggml_get_name.restype, linked.ggml_get_name.argtypes = ctypes.c_void_p, [ctypes.c_void_p]
    linked.ggml_nbytes.restype, linked.ggml_nbytes.argtypes = ctypes.c_size_t, [ctypes.c_void_p]
    linked.ggml_backend_tensor_get.restype = None
    linked.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    linked.ggml_backend_dev_count.restype, linked.ggml_backend_dev_count.argtypes = ctypes.c_size_t, []
    linked.ggml_get_type_traits.restype, linked.ggml_get_type_traits.argtypes = ctypes.c_void_p, [ctypes.c_int]
    return linked


@cache
def _native() -> Any:
    """Return a callback in machine code that finds a node by name, or None where there is none for this host."""
    # With other devices the graph is computed in parts, and a later part may overwrite the tensor.
    if sys.platform != "linux" or platform.machine() not in {"x86_64", "AMD64"} or ggml().ggml_backend_dev_count() != 1:
        return None
    probe = ctypes.create_string_buffer(4096)
    name = ggml().ggml_get_name(ctypes.addressof(probe)) - ctypes.addressof(probe)
    code = b"".join((
        b"\xf3\x0f\x1e\xfa",  # endbr64
        b"\x48\x8b\x87", name.to_bytes(4, "little"),  # mov rax, [rdi + name]
        b"\x48\x3b\x02",  # cmp rax, [rdx]
        b"\x75\x1a",  # jne no
        b"\x48\x8b\x87", (name + _WORD).to_bytes(4, "little"),  # mov rax, [rdi + name + 8]
        b"\x48\x33\x42\x10",  # xor rax, [rdx + 16]
        b"\x48\x23\x42\x08",  # and rax, [rdx + 8]
        b"\x75\x09",  # jne no
        b"\x48\x89\x7a\x18",  # mov [rdx + 24], rdi
        b"\x40\x0f\xb6\xc6",  # movzx eax, sil: wanted when asked, the end when read
        b"\xc3",  # ret
        b"\x31\xc0\xc3",  # no: xor eax, eax; ret
    ))  # fmt: skip
    try:
        memory = mmap.mmap(-1, mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    except OSError:  # forbidden here, as by systemd's MemoryDenyWriteExecute
        return None
    memory.write(code)
    return memory


class Tap:
    """What a context's `cb_eval` is set to; one context each. Runs in the context's thread."""

    def __init__(self, layer: int, *, native: bool = True) -> None:
        """Tap what leaves `layer`, counted from 0."""
        name = f"l_out-{layer}".encode()
        padded = (name + b"\0").ljust(2 * _WORD, b"\0")
        self._words = (ctypes.c_uint64 * 4)()
        self._words[_WANTED] = int.from_bytes(padded[:_WORD], "little")
        self._words[_TAIL] = int.from_bytes(padded[_WORD:], "little")
        self._words[_MASK] = (1 << 8 * max(0, len(name) + 1 - _WORD)) - 1
        self._taken: bytearray | None = None
        self.data = ctypes.cast(self._words, ctypes.c_void_p)
        api = library()
        memory = _native() if native else None
        self.is_native = memory is not None
        if memory is not None:
            self.callback = api.ggml_backend_sched_eval_callback(ctypes.addressof(ctypes.c_char.from_buffer(memory)))
        else:
            self.callback = api.ggml_backend_sched_eval_callback(self._closure(name))

    def _closure(self, wanted: bytes) -> Any:
        name_of, string_at, read = ggml().ggml_get_name, ctypes.string_at, self._read

        def evaluated(tensor: int, ask: bool, _: int | None) -> bool:
            if string_at(name_of(tensor)) != wanted:
                return False
            if not ask:
                self._taken = read(tensor)
            return ask

        return evaluated

    def _read(self, tensor: int) -> bytearray:
        size = ggml().ggml_nbytes(tensor)
        taken = bytearray(size)
        ggml().ggml_backend_tensor_get(tensor, (ctypes.c_char * size).from_buffer(taken), 0, size)
        return taken

    def clear(self) -> None:
        """Forget the last evaluation."""
        self._words[_FOUND], self._taken = 0, None

    def take(self, size: int) -> bytearray:
        """Return what the evaluation since `clear` gave, `size` bytes of f32. Raises ModelError if it gave another."""
        found = self._words[_FOUND]
        taken = self._read(found) if found else self._taken
        self.clear()
        if taken is None or len(taken) != size:
            raise ModelError(f"the last layer gave {len(taken or b'')} bytes of activations, not {size}")
        return taken
