"""Loads one model file and evaluates a token, in a process of its own that llama.cpp may abort.

Run with the file's path; answers with one line of JSON on stdout: {"ok": true} or {"refused": "why"}.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import sys
import threading
from typing import Any

SAMPLE = "".join(map(chr, range(0x800))) + "".join(
    chr(first) for first in (*range(0x800, 0xD000, 0x800), 0x10000, 0x40000, 0x80000, 0xC0000, 0x100000)
)
"""Every byte that UTF-8 may hold: a vocabulary that lacks one ends the process when a text has it."""
_CONTEXT = 64
_ERROR = 4  # enum ggml_log_level


def main() -> None:
    """Try the file; whatever else is printed goes to stderr."""
    answer = os.dup(1)
    os.dup2(2, 1)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    refused = try_file(sys.argv[1])
    os.write(answer, json.dumps({"refused": refused} if refused else {"ok": True}).encode() + b"\n")
    os._exit(0)  # freeing could only fail, and what is mapped goes with the process


def _end_with_parent() -> None:
    while os.read(0, 1):
        pass
    os._exit(1)


def try_file(path: str) -> str:
    """Return why llama.cpp refuses the file, "" if it does not."""
    import llama_cpp.llama_cpp as api

    errors: list[str] = []

    def note(level: int, text: bytes | None, _: object) -> None:
        if level == _ERROR and len(errors) < 16:
            errors.append((text or b"").decode("utf-8", "replace").strip()[:500])

    callback = api.llama_log_callback(note)
    api.llama_log_set(callback, None)
    api.llama_backend_init()
    params = api.llama_model_default_params()
    none = (ctypes.c_void_p * 1)(None)
    params.devices = ctypes.cast(none, ctypes.c_void_p)
    params.n_gpu_layers = 0
    params.use_extra_bufts = False  # weights stay mapped, shared with whoever loads the file next
    model = api.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        return _reason(errors)
    vocabulary = api.llama_model_get_vocab(model)
    size = _words(api, vocabulary)
    context_params = api.llama_context_default_params()
    context_params.n_ctx, context_params.n_batch, context_params.n_ubatch = _CONTEXT, _CONTEXT, _CONTEXT
    context_params.n_threads = context_params.n_threads_batch = _threads()
    context = api.llama_init_from_model(model, context_params)
    if not context:
        return _reason(errors)
    tokens = (ctypes.c_int32 * 2)(0, max(0, size - 1))
    batch = api.llama_batch_get_one(tokens, 2)
    if size > 0:
        encoded = api.llama_encode(context, batch) if api.llama_model_has_encoder(model) else 0
        code = api.llama_decode(context, batch) if api.llama_model_has_decoder(model) else encoded
        if code:
            return f"it cannot evaluate a token: {_reason(errors)} (code {code})"
    return ""


def _threads() -> int:
    """Return half the cores: who generates meanwhile comes first."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, count // 2)


def _words(api: Any, vocabulary: Any) -> int:
    """Go through all that the vocabulary does: text to tokens, each token to text. Returns its size."""
    size = int(api.llama_vocab_n_tokens(vocabulary))
    if api.llama_vocab_type(vocabulary) == api.LLAMA_VOCAB_TYPE_NONE:
        return size
    text = SAMPLE.encode()
    buffer = (ctypes.c_int32 * (len(text) + 8))()
    api.llama_tokenize(vocabulary, text, len(text), buffer, len(buffer), True, True)
    piece = ctypes.create_string_buffer(256)
    for token in range(size):
        api.llama_token_to_piece(vocabulary, token, piece, len(piece), 0, False)
        api.llama_token_to_piece(vocabulary, token, piece, len(piece), 0, True)
    for special in (api.llama_vocab_bos(vocabulary), api.llama_vocab_eos(vocabulary)):
        if 0 <= special < size:
            api.llama_vocab_get_text(vocabulary, special)
            api.llama_vocab_is_eog(vocabulary, special)
    return size


def _reason(errors: list[str]) -> str:
    for line in errors:
        if "error loading model: " in line:
            return line.partition("error loading model: ")[2]
    return errors[0] if errors else "llama.cpp does not say why"


if __name__ == "__main__":
    main()
