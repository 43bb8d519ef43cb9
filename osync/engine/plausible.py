"""What a header must say so that llama.cpp does not end the process over it. Pure.

Only what can be told without the architecture's own code; what is left is found out by `trial.py`.
"""

from __future__ import annotations

import math
from typing import Final

from osync.engine.gguf import GGUFArray, GGUFHeader
from osync.errors import ModelUnusable

MAX_LAYERS: Final = 512  # LLAMA_MAX_LAYERS
TENSOR_ALIGNMENT: Final = 32  # ggml's, of what it maps
_STRING, _ARRAY = 8, 9
_ITEMS: Final = {
    "tokenizer.ggml.tokens": (_STRING,),
    "tokenizer.ggml.merges": (_STRING,),
    "tokenizer.ggml.scores": (6,),
    "tokenizer.ggml.token_type": (4, 5),
    "tokenizer.ggml.precompiled_charsmap": (0, 1),
}
"""Items of these arrays are read as these types, whatever the file calls them."""

_COUNTS: Final = {
    "embedding_length": 1, "context_length": 1, "attention.head_count": 0, "attention.head_count_kv": 0,
    "attention.key_length": 0, "attention.value_length": 0, "feed_forward_length": 0,
}  # fmt: skip
"""Numbers, some of them by layer, with the least that each may be; recurrent layers have no heads."""


def check_plausible(header: GGUFHeader, what: str) -> None:
    """Raise ModelUnusable for a header that llama.cpp would break on."""

    def fault(text: str) -> ModelUnusable:
        return ModelUnusable(f"{what}: {text}")

    name = header.architecture
    layers = header.metadata.get(f"{name}.block_count")
    if layers is not None and not (_is_count(layers) and 1 <= int(str(layers)) <= MAX_LAYERS):
        raise fault(f"{name}.block_count is {layers!r}, not 1 to {MAX_LAYERS}")
    for key, least in _COUNTS.items():
        value = header.metadata.get(f"{name}.{key}")
        for item in value if isinstance(value, tuple) else (value,):
            if item is not None and not (isinstance(item, (int, float)) and least <= item < 1 << 31):
                raise fault(f"{name}.{key} is {value!r}: not plausible")
    used, experts = header.of_architecture("expert_used_count"), header.of_architecture("expert_count")
    if not 0 <= used <= experts or (experts > 0 and used == 0):
        raise fault(f"{name}.expert_used_count is {used}, of {experts} experts")
    if not experts and header.of_architecture("expert_group_count"):
        raise fault(f"{name}.expert_group_count is set, and there are no experts")
    if header.of_architecture("nextn_predict_layers") > header.block_count:
        raise fault(f"{name}.nextn_predict_layers exceeds the number of layers")
    for key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon", "attention.group_norm_epsilon"):
        value = header.metadata.get(f"{name}.{key}")
        if isinstance(value, float) and not (math.isfinite(value) and value >= 0):
            raise fault(f"{name}.{key} is {value}")
    for tensor in header.tensors:
        if tensor.offset % TENSOR_ALIGNMENT:
            raise fault(f"the tensor {tensor.name!r} does not lie at a multiple of {TENSOR_ALIGNMENT} bytes")
    _check_vocabulary(header, what)


def _check_vocabulary(header: GGUFHeader, what: str) -> None:
    for key, kinds in _ITEMS.items():
        entry = header.entries.get(key)
        if entry is not None and (entry.kind != _ARRAY or entry.item_kind not in kinds):
            raise ModelUnusable(f"{what}: {key} is no array of the type that it must have")
    words = _length(header, "tokenizer.ggml.tokens")
    for key in ("tokenizer.ggml.scores", "tokenizer.ggml.token_type"):
        if key in header.metadata and (count := _length(header, key)) < words:
            raise ModelUnusable(f"{what}: {key} has {count} items for {words} tokens")


def _length(header: GGUFHeader, key: str) -> int:
    value = header.metadata.get(key)
    if isinstance(value, GGUFArray):
        return value.count
    return len(value) if isinstance(value, tuple) else 0


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
