"""A llama-architecture model of some tens of KiB that llama.cpp really loads, and files that lie in its place.

Written byte by byte, so that a test can write what no honest writer would.
"""

from __future__ import annotations

import copy
import math
import random
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

WIDTH, LAYERS, HEADS, KV_HEADS, INNER, WORDS = 32, 2, 4, 2, 64, 320

_CODES = {"u8": (0, "B"), "u16": (2, "H"), "u32": (4, "I"), "i32": (5, "i"), "f32": (6, "f"), "bool": (7, "?"),
          "u64": (10, "Q"), "i64": (11, "q"), "f64": (12, "d")}  # fmt: skip
_BYTES_OF = {0: (1, 4), 1: (1, 2), 2: (32, 18), 8: (32, 34)}


def text(value: str | bytes) -> bytes:
    """Return a GGUF string."""
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


@dataclass(slots=True)
class Tensor:
    """One tensor's entry; `offset` None: right behind the one before."""

    name: str
    shape: tuple[int, ...]
    kind: int = 0
    offset: int | None = None

    @property
    def size(self) -> int:
        """Bytes that honest data takes."""
        block, size = _BYTES_OF.get(self.kind, (1, 4))
        return math.prod(self.shape) // block * size


@dataclass(slots=True)
class Tiny:
    """A model that `data` writes; tests change it before."""

    metadata: dict[str, tuple[str, Any]]
    tensors: list[Tensor]
    alignment: int = 32
    tensor_count: int | None = None
    key_count: int | None = None
    version: int = 3
    raw: dict[str, bytes] = field(default_factory=dict)
    """Keys whose value is written as these bytes, type included."""

    def header(self) -> bytes:
        """Return all in front of the tensors' data."""
        keys = self.key_count if self.key_count is not None else len(self.metadata) + len(self.raw)
        count = self.tensor_count if self.tensor_count is not None else len(self.tensors)
        out = bytearray(b"GGUF" + struct.pack("<IQQ", self.version, count, keys))
        for key, (kind, value) in self.metadata.items():
            out += text(key) + _value(kind, value)
        for key, raw in self.raw.items():
            out += text(key) + raw
        at = 0
        for tensor in self.tensors:
            offset = at if tensor.offset is None else tensor.offset
            out += text(tensor.name) + struct.pack("<I", len(tensor.shape))
            out += b"".join(struct.pack("<Q", n & (2**64 - 1)) for n in tensor.shape)
            out += struct.pack("<IQ", tensor.kind, offset & (2**64 - 1))
            at = (at + tensor.size + 31) // 32 * 32
        return bytes(out) + bytes(-len(out) % self.alignment)

    def data(self) -> bytes:
        """Return the whole file: every weight is small, none is zero."""
        size = sum((t.size + 31) // 32 * 32 for t in self.tensors if 0 <= t.size < 1 << 22)
        rng = random.Random(7)
        numbers = [rng.uniform(-0.1, 0.1) for _ in range(1024)]
        block = struct.pack("<1024f", *numbers)
        return self.header() + (block * (size // len(block) + 1))[:size]

    def copy(self) -> Tiny:
        """Return a copy that can be changed."""
        return copy.deepcopy(self)

    def tensor(self, name: str) -> Tensor:
        """Return a tensor by its name."""
        return next(t for t in self.tensors if t.name == name)


def _value(kind: str, value: Any) -> bytes:
    if kind == "str":
        return struct.pack("<I", 8) + text(value)
    if kind.startswith("["):
        item = kind[1:-1]
        if item == "str":
            return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(text, value))
        number, code = _CODES[item]
        return struct.pack("<IIQ", 9, number, len(value)) + struct.pack(f"<{len(value)}{code}", *value)
    number, code = _CODES[kind]
    return struct.pack("<I" + code, number, value)


def tiny(*, layers: int = LAYERS, vocabulary: str = "llama") -> Tiny:
    """Return an honest model; `vocabulary` is llama (sentencepiece) or gpt2 (byte pairs)."""
    metadata: dict[str, tuple[str, Any]] = {
        "general.architecture": ("str", "llama"),
        "general.name": ("str", "Tiny"),
        "general.file_type": ("u32", 0),
        "llama.context_length": ("u32", 256),
        "llama.embedding_length": ("u32", WIDTH),
        "llama.block_count": ("u32", layers),
        "llama.feed_forward_length": ("u32", INNER),
        "llama.attention.head_count": ("u32", HEADS),
        "llama.attention.head_count_kv": ("u32", KV_HEADS),
        "llama.attention.layer_norm_rms_epsilon": ("f32", 1e-5),
        "llama.rope.dimension_count": ("u32", WIDTH // HEADS),
        "llama.rope.freq_base": ("f32", 10000.0),
        "llama.vocab_size": ("u32", WORDS),
    }
    metadata |= _sentencepiece() if vocabulary == "llama" else _byte_pairs()
    tensors = [Tensor("token_embd.weight", (WIDTH, WORDS))]
    for layer in range(layers):
        kv = WIDTH // HEADS * KV_HEADS
        for name, shape in (
            ("attn_norm", (WIDTH,)), ("attn_q", (WIDTH, WIDTH)), ("attn_k", (WIDTH, kv)), ("attn_v", (WIDTH, kv)),
            ("attn_output", (WIDTH, WIDTH)), ("ffn_norm", (WIDTH,)), ("ffn_gate", (WIDTH, INNER)),
            ("ffn_up", (WIDTH, INNER)), ("ffn_down", (INNER, WIDTH)),
        ):  # fmt: skip
            tensors.append(Tensor(f"blk.{layer}.{name}.weight", shape))
    tensors.append(Tensor("output_norm.weight", (WIDTH,)))
    return Tiny(metadata, tensors)


def _sentencepiece() -> dict[str, tuple[str, Any]]:
    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    kinds = [2, 3, 3, *[6] * 256]
    more = [" ", *"etaoinshrdlu", "th", "the", "an", "in", "er"]
    words += [w.replace(" ", "\u2581") for w in more]
    words += [f"w{n}" for n in range(WORDS - len(words))]
    kinds += [1] * (WORDS - len(kinds))
    return {
        "tokenizer.ggml.model": ("str", "llama"),
        "tokenizer.ggml.tokens": ("[str]", words),
        "tokenizer.ggml.scores": ("[f32]", [-float(n) for n in range(WORDS)]),
        "tokenizer.ggml.token_type": ("[i32]", kinds),
        "tokenizer.ggml.bos_token_id": ("u32", 1),
        "tokenizer.ggml.eos_token_id": ("u32", 2),
        "tokenizer.ggml.unknown_token_id": ("u32", 0),
        "tokenizer.ggml.add_bos_token": ("bool", True),
    }


def _byte_pairs() -> dict[str, tuple[str, Any]]:
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    rest = [byte for byte in range(256) if byte not in plain]
    letters = [chr(byte) for byte in plain] + [chr(256 + number) for number in range(len(rest))]
    merges = ["t h", "th e", "a n", "i n", "e r"]
    words = [*letters, *(m.replace(" ", "") for m in merges), "<|end|>", "<|start|>"]
    words += [f"w{n}" for n in range(WORDS - len(words))]
    kinds = [3 if w.startswith("<|") else 1 for w in words]
    return {
        "tokenizer.ggml.model": ("str", "gpt2"),
        "tokenizer.ggml.pre": ("str", "default"),
        "tokenizer.ggml.tokens": ("[str]", words),
        "tokenizer.ggml.token_type": ("[i32]", kinds),
        "tokenizer.ggml.merges": ("[str]", merges),
        "tokenizer.ggml.bos_token_id": ("u32", words.index("<|start|>")),
        "tokenizer.ggml.eos_token_id": ("u32", words.index("<|end|>")),
    }


# Files that lie. Each either is refused with a clear error, or loads.

_WORST = (0, 1, 2, 3, 5, 7, 31, 33, 64, 1000, 1 << 16, (1 << 31) - 1, (1 << 32) - 1)


def lies() -> Iterator[tuple[str, bytes]]:
    """Yield named files, the same ones every time."""
    good = tiny()
    whole = good.data()
    head = len(good.header())
    for cut in (0, 3, 4, 8, 20, 24, 25, 100, head // 2, head - 1, head, head + 100, len(whole) - 33):
        yield f"cut at {cut}", whole[:cut]
    yield "a tail of garbage", whole + b"\xff" * 4097
    for count in (0, 1, 1 << 31, 1 << 63, (1 << 64) - 1):
        yield f"{count} tensors", replace(good, tensor_count=count).data()
        yield f"{count} keys", replace(good, key_count=count).data()
    numbers = [key for key, (kind, _) in good.metadata.items() if kind == "u32"]
    for key in numbers:
        for number in _WORST:
            yield f"{key} {number}", _with(key, "u32", number)
        yield f"{key} missing", _without(key)
        yield f"{key} a string", _with(key, "str", "lie")
        yield f"{key} negative", _with(key, "i32", -1)
        yield f"{key} a fraction", _with(key, "f32", 1.5)
        yield f"{key} an array", _with(key, "[u32]", [1, 2, 3])
        yield f"{key} an array by layer", _with(key, "[u32]", [4, 2])
        yield f"{key} an empty array", _with(key, "[u32]", [])
        yield f"{key} of 64 bits", _with(key, "u64", 1 << 63)
    for key in ("llama.attention.key_length", "llama.attention.value_length", "llama.expert_count",
                "llama.expert_used_count", "llama.rope.scaling.original_context_length",
                "llama.attention.sliding_window",
                "llama.pooling_type", "tokenizer.ggml.padding_token_id", "tokenizer.ggml.eot_token_id",
                "llama.leading_dense_block_count", "llama.nextn_predict_layers",
                "llama.expert_group_count"):  # fmt: skip
        for number in _WORST:
            yield f"{key} {number}", _with(key, "u32", number)
    for key in ("llama.attention.layer_norm_rms_epsilon", "llama.rope.freq_base", "llama.rope.scaling.factor",
                "llama.attention.clamp_kqv", "llama.attention.max_alibi_bias", "llama.logit_scale"):  # fmt: skip
        for real in (0.0, -1.0, math.nan, math.inf, 3e38, 1e-45):
            yield f"{key} {real}", _with(key, "f32", real)
    for name in ("", "lama", "bert", "gpt2", "mamba", "qwen2", "gemma3", "t5", "rwkv6", "clip", "phi3", "x" * 9000):
        yield f"architecture {name[:9]}", _with("general.architecture", "str", name)
        yield f"architecture {name[:9]} throughout", _renamed(name)
    yield from _vocabularies()
    yield from _tensors()
    for number in (0, 1, 3, 8, 16, 64, 4096, 1 << 31, (1 << 32) - 1):
        yield f"alignment {number}", _with("general.alignment", "u32", number)
    yield "alignment a string", _with("general.alignment", "str", "32")
    yield "alignment of 64 bits", _with("general.alignment", "u64", 32)
    for kind in (9, 13, 99, (1 << 32) - 1):
        yield f"a key of type {kind}", _raw("odd", struct.pack("<I", kind) + bytes(64))
        yield f"an array of type {kind}", _raw("odd", struct.pack("<IIQ", 9, kind, 2) + bytes(64))
    for count in (1 << 20, 1 << 31, 1 << 62, 1 << 63, (1 << 64) - 1):
        for item in (0, 4, 8, 10):
            yield f"{count} items of type {item}", _raw("odd", struct.pack("<IIQ", 9, item, count))
        yield f"a string of {count} bytes", _raw("odd", struct.pack("<IQ", 8, count))
    yield "a bool of 7", _raw("odd", struct.pack("<IB", 7, 7))
    yield "text that is no UTF-8", _raw("general.description", struct.pack("<I", 8) + text(b"\xff\xfe\x00\x80"))
    yield "a key with a NUL", _with("odd\0key", "u32", 1)
    yield "an empty key", _with("", "u32", 1)
    yield "a long key", _with("k" * 65535, "u32", 1)


def _vocabularies() -> Iterator[tuple[str, bytes]]:
    for kind in ("llama", "gpt2"):
        for key in [k for k in tiny(vocabulary=kind).metadata if k.startswith("tokenizer.")]:
            form, value = tiny(vocabulary=kind).metadata[key]
            yield f"{kind} {key} missing", _without(key, kind)
            yield f"{kind} {key} a number", _with(key, "u32", 5, kind)
            yield f"{kind} {key} a string", _with(key, "str", "lie", kind)
            yield f"{kind} {key} numbers", _with(key, "[u32]", [1, 2, 3], kind)
            yield f"{kind} {key} strings", _with(key, "[str]", ["a", "b"], kind)
            if form.startswith("["):
                yield f"{kind} {key} none", _with(key, form, [], kind)
                yield f"{kind} {key} one short", _with(key, form, value[:-1], kind)
                yield f"{kind} {key} half", _with(key, form, value[: len(value) // 2], kind)
                yield f"{kind} {key} doubled", _with(key, form, value * 2, kind)
                yield f"{kind} {key} all the same", _with(key, form, value[:1] * len(value), kind)
                yield f"{kind} {key} reversed", _with(key, form, value[::-1], kind)
            if form == "[str]":
                yield f"{kind} {key} all empty", _with(key, form, [""] * len(value), kind)
                yield f"{kind} {key} no UTF-8", _with(key, form, [b"\xff\xc0\x80"] * len(value), kind)
                yield f"{kind} {key} NULs", _with(key, form, ["\0"] * len(value), kind)
                yield f"{kind} {key} spaces", _with(key, form, [" "] * len(value), kind)
                yield f"{kind} {key} long", _with(key, form, ["x" * 5000] * len(value), kind)
                yield f"{kind} {key} byte words", _with(key, form, ["<0xZZ>"] * len(value), kind)
            if form == "[i32]":
                for number in (-1, 0, 2, 3, 6, 99, 1 << 30):
                    yield f"{kind} {key} all {number}", _with(key, form, [number] * len(value), kind)
            if form == "[f32]":
                yield f"{kind} {key} NaN", _with(key, form, [math.nan] * len(value), kind)
            if form == "u32":
                for number in (WORDS - 1, WORDS, 1 << 20, (1 << 31) - 1, 1 << 31, (1 << 32) - 1):
                    yield f"{kind} {key} {number}", _with(key, form, number, kind)
        for model in ("", "none", "no_vocab", "llama", "gpt2", "bert", "t5", "rwkv", "plamo2", "lie"):
            yield f"{kind} as {model}", _with("tokenizer.ggml.model", "str", model, kind)
        for pre in ("", "lie", "llama3", "qwen2", "gpt-4o", "tekken", "x" * 300):
            yield f"{kind} pre {pre[:9]}", _with("tokenizer.ggml.pre", "str", pre, kind)
        yield f"{kind} charsmap", _with("tokenizer.ggml.precompiled_charsmap", "[u8]", [255] * 9, kind)
        yield f"t5 charsmap over {kind}", _t5(kind, [255] * 9)
        yield f"t5 charsmap of zeros over {kind}", _t5(kind, [0] * 64)
        yield f"t5 without a charsmap over {kind}", _t5(kind, [])
        yield f"{kind} chat template", _with("tokenizer.chat_template", "str", "{% for", kind)


def _t5(kind: str, charsmap: list[int]) -> bytes:
    changed = tiny(vocabulary=kind)
    changed.metadata["tokenizer.ggml.model"] = ("str", "t5")
    if charsmap:
        changed.metadata["tokenizer.ggml.precompiled_charsmap"] = ("[u8]", charsmap)
    return changed.data()


def _tensors() -> Iterator[tuple[str, bytes]]:
    names = [t.name for t in tiny().tensors if "blk.1" not in t.name]
    for name in names:
        shape = tiny().tensor(name).shape
        yield f"{name} missing", _tensors_changed(drop=name)
        yield f"{name} twice", _tensors_changed(add=copy.copy(tiny().tensor(name)))
        yield f"{name} with a longer name", _on(name, name="x" * 63)
        yield f"{name} with no name", _on(name, name="")
        for kind in (1, 2, 8, 4, 5, 13, 24, 26, 31, 38, 42, 99, (1 << 32) - 1):
            yield f"{name} type {kind}", _on(name, kind=kind)
        for offset in (1, 32, 4096, 1 << 30, 1 << 63, (1 << 64) - 32):
            yield f"{name} at {offset}", _on(name, offset=offset)
        shapes = [(), (0,), (1,), shape[::-1], (*shape, 1), (*shape, 2), (*shape, 0), (shape[0] * 2, *shape[1:]),
                  (1, 1, 1, 1, 1), (1 << 31, 1 << 31), (1 << 63,), ((1 << 64) - 1,), (*shape[:-1], shape[-1] - 1),
                  (32, 1, 1, 1), (shape[0], 1), (16, 16)]  # fmt: skip
        for new in shapes:
            yield f"{name} shape {new}", _on(name, shape=new)
    extra = [("rope_freqs.weight", (4,)), ("rope_freqs.weight", (5,)), ("output.weight", (WIDTH, WORDS - 1)),
             ("output.weight", (WIDTH,)), ("blk.0.attn_q.bias", (7,)), ("blk.7.attn_q.weight", (WIDTH, WIDTH)),
             ("blk.4294967295.attn_q.weight", (4,)), ("blk.-1.x", (4,)), ("blk..x", (4,)), ("blk.x.y", (4,)),
             ("blk.0.attn_q.weight.scale", (1,)), ("blk.0.ffn_gate_inp.weight", (WIDTH, 2)),
             ("blk.0.attn_q_norm.weight", (8,)), ("cls.output.weight", (4, 4)), ("a\0b", (4,))]  # fmt: skip
    for name, shape in extra:
        yield f"extra {name!r} {shape}", _tensors_changed(add=Tensor(name, shape))


def _changed(change: Callable[[Tiny], object], kind: str = "llama") -> bytes:
    model = tiny(vocabulary=kind)
    change(model)
    return model.data()


def _without(key: str, kind: str = "llama") -> bytes:
    return _changed(lambda t: t.metadata.pop(key), kind)


def _tensors_changed(drop: str = "", add: Tensor | None = None) -> bytes:
    model = tiny()
    model.tensors = [t for t in model.tensors if t.name != drop] + ([add] if add else [])
    return model.data()


def _with(key: str, form: str, value: Any, kind: str = "llama") -> bytes:
    return _changed(lambda t: t.metadata.__setitem__(key, (form, value)), kind)


def _raw(key: str, raw: bytes) -> bytes:
    return _changed(lambda t: t.raw.__setitem__(key, raw))


def _renamed(architecture: str) -> bytes:
    def rename(model: Tiny) -> None:
        metadata = {k.replace("llama.", f"{architecture}.", 1) if k.startswith("llama.") else k: v
                    for k, v in model.metadata.items()}  # fmt: skip
        metadata["general.architecture"] = ("str", architecture)
        model.metadata = metadata

    return _changed(rename)


def _on(tensor_name: str, /, **changes: Any) -> bytes:
    def change(model: Tiny) -> None:
        tensor = model.tensor(tensor_name)
        for key, value in changes.items():
            setattr(tensor, key, value)

    return _changed(change)


def scrambled(seed: int) -> bytes:
    """Return a model with some bytes of its header changed, the same ones for the same seed."""
    rng = random.Random(seed)
    model = tiny(vocabulary=rng.choice(("llama", "gpt2")))
    data = bytearray(model.data())
    # Numbers and types lie in front of and behind the vocabulary, which is most of the header.
    end = len(model.header())
    words = data.find(b"tokenizer.ggml.tokens")
    for _ in range(rng.choice((1, 1, 1, 2, 3, 8))):
        part = rng.choice(((8, words), (end - 1500, end), (8, end)))
        at = rng.randrange(*part)
        if rng.random() < 0.5:
            data[at] ^= 1 << rng.randrange(8)
        else:
            data[at] = rng.choice((0, 1, 255, 127, 128, rng.randrange(256)))
    return bytes(data)
