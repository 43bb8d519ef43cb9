"""Quantizes one GGUF file in a process of its own: `python -m osync.engine.quantize_worker SOURCE TARGET TYPE THREADS`.

llama.cpp's quantizer takes minutes, cannot be cancelled, and aborts the process on a file that it does not
like: so it gets a process that may be killed and may die.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from typing import Final

FILE_TYPES: Final = {
    "f16": 1, "q4_0": 2, "q4_1": 3, "q8_0": 7, "q5_0": 8, "q5_1": 9, "q2_k": 10, "q3_k_s": 11, "q3_k_m": 12,
    "q3_k_l": 13, "q4_k_s": 14, "q4_k_m": 15, "q5_k_s": 16, "q5_k_m": 17, "q6_k": 18,
}  # fmt: skip
"""llama.cpp's number of each type (enum llama_ftype in llama.h)."""


def main(arguments: list[str]) -> int:
    """Quantize; returns 0, or 1 with llama.cpp's reason on stderr."""
    source, target, kind, threads = arguments
    with contextlib.suppress(OSError):
        os.nice(10)  # streams that run in the daemon come first
    from osync.engine.llama import library, reason, take_errors

    api = library()
    params = api.llama_model_quantize_default_params()
    params.ftype = FILE_TYPES[kind]
    params.nthread = int(threads)
    take_errors()
    code = api.llama_model_quantize(os.fsencode(source), os.fsencode(target), ctypes.byref(params))
    if code:
        print(reason(take_errors()), file=sys.stderr)  # noqa: T201 - this is how it answers
        return 1
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
