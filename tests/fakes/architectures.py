"""Tiny random models of several architectures, written with the gguf package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

WIDTH, HEADS, KV_HEADS, HEAD, INNER, WORDS, EXPERTS = 64, 4, 2, 16, 96, 96, 4
WINDOW = 8


def write_model(
    path: Path, arch: str, layers: int, *, tied: bool = True, vocabulary: str = "no_vocab", **numbers: Any
) -> Path:
    """Write a model of random f32 weights; `numbers` are further keys, `__` standing for a dot."""
    import gguf

    writer = gguf.GGUFWriter(path, arch)
    random = np.random.default_rng(layers)
    shape = {
        "block_count": layers, "context_length": 512, "embedding_length": WIDTH, "feed_forward_length": INNER,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "attention.key_length": HEAD,
        "attention.value_length": HEAD, "rope.dimension_count": HEAD, "vocab_size": WORDS,
    }  # fmt: skip
    if arch in {"qwen3moe", "gpt-oss"}:
        shape |= {"expert_count": EXPERTS, "expert_used_count": 2, "expert_feed_forward_length": 32}
    if arch in {"gemma3", "gpt-oss"}:
        shape["attention.sliding_window"] = WINDOW
    for key, value in (shape | {key.replace("__", "."): value for key, value in numbers.items()}).items():
        if isinstance(value, list):
            writer.add_array(f"{arch}.{key}", value)
        else:
            writer.add_uint32(f"{arch}.{key}", value)
    writer.add_float32(f"{arch}.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_string("tokenizer.ggml.model", vocabulary)
    writer.add_array("tokenizer.ggml.words", [f"word{i}" for i in range(2000)])  # long, for a real one

    def tensor(name: str, *size: int, near: float = 0.0) -> None:
        writer.add_tensor(name, (near + random.normal(0, 0.08, size)).astype(np.float32))

    tensor("token_embd.weight", WORDS, WIDTH)
    tensor("output_norm.weight", WIDTH, near=1.0)
    if not tied:
        tensor("output.weight", WORDS, WIDTH)
    for layer in range(layers):
        for name, size in _layer(arch).items():
            tensor(f"blk.{layer}.{name}", *size, near=float("norm" in name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _layer(arch: str) -> dict[str, tuple[int, ...]]:
    query, key, inner = HEADS * HEAD, KV_HEADS * HEAD, 32
    parts: dict[str, tuple[int, ...]] = {
        "attn_norm.weight": (WIDTH,), "attn_q.weight": (query, WIDTH), "attn_k.weight": (key, WIDTH),
        "attn_v.weight": (key, WIDTH), "attn_output.weight": (WIDTH, query),
    }  # fmt: skip
    parts["post_attention_norm.weight" if arch == "gpt-oss" else "ffn_norm.weight"] = (WIDTH,)
    if arch in {"qwen2", "gpt-oss"}:
        parts |= {"attn_q.bias": (query,), "attn_k.bias": (key,), "attn_v.bias": (key,)}
    if arch in {"qwen3", "qwen3moe", "gemma3"}:
        parts |= {"attn_q_norm.weight": (HEAD,), "attn_k_norm.weight": (HEAD,)}
    if arch == "gemma3":
        parts |= {"post_attention_norm.weight": (WIDTH,), "post_ffw_norm.weight": (WIDTH,)}
    if arch in {"qwen3moe", "gpt-oss"}:
        parts |= {
            "ffn_gate_inp.weight": (EXPERTS, WIDTH), "ffn_gate_exps.weight": (EXPERTS, inner, WIDTH),
            "ffn_up_exps.weight": (EXPERTS, inner, WIDTH), "ffn_down_exps.weight": (EXPERTS, WIDTH, inner),
        }  # fmt: skip
    elif arch == "phi3":
        parts |= {"ffn_up.weight": (2 * INNER, WIDTH), "ffn_down.weight": (WIDTH, INNER)}
    else:
        parts |= {"ffn_gate.weight": (INNER, WIDTH), "ffn_up.weight": (INNER, WIDTH), "ffn_down.weight": (WIDTH, INNER)}
    if arch == "gpt-oss":
        parts |= {
            "attn_sinks.weight": (HEADS,), "attn_output.bias": (WIDTH,), "ffn_gate_inp.bias": (EXPERTS,),
            "ffn_gate_exps.bias": (EXPERTS, inner), "ffn_up_exps.bias": (EXPERTS, inner),
            "ffn_down_exps.bias": (EXPERTS, WIDTH),
        }  # fmt: skip
    return parts
