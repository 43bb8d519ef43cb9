"""Where a model may be cut into stages, and what its layers weigh: from a GGUF header alone. Pure."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from osync.engine.gguf import GGUFHeader, TensorInfo

BLOCK = re.compile(r"blk\.(\d+)\.")
EVERYWHERE = ("rope_freqs.", "rope_factors_long.", "rope_factors_short.")
"""Tensors that belong to no layer and are used by all."""


@dataclass(frozen=True, slots=True)
class Architecture:
    """What must be known of a kind of model to cut it: checked against llama.cpp's graph and by a tiny model each."""

    scales_tokens: bool = False
    """Embeddings of tokens are multiplied by the root of their width; activations that come in are not."""
    window_period: int = 0
    """Where the file has no pattern: every so many layers one looks beyond the sliding window. 0: none, or unused."""


# Those that scale whatever comes in (gemma, gemma2), carry several streams between layers or look tokens up again
# in later ones (gemma3n, gemma4, rwkv), or keep a recurrent state are not here: they are served whole.
ARCHITECTURES: Mapping[str, Architecture] = MappingProxyType({
    "llama": Architecture(),
    "qwen2": Architecture(),
    "qwen3": Architecture(),
    "qwen3moe": Architecture(),
    "phi3": Architecture(),
    "gemma3": Architecture(scales_tokens=True, window_period=6),
    "gpt-oss": Architecture(window_period=2),
})  # fmt: skip
# llama.cpp takes a layer's scale of attention from the number of layers here (gemma-3-27b), and a slice has others.
_SCALE_BY_DEPTH = {("gemma3", 62)}


@dataclass(frozen=True, slots=True)
class CutRules:
    """Between which layers a model may be cut."""

    points: tuple[int, ...]
    """Ascending: a stage of any length may begin at layer n."""
    reason: str = ""
    """Why not everywhere, or why not at all."""
    layers: int = 0
    period: int = 0
    """Of layers that share a sliding window; 0: none do."""

    @property
    def is_whole(self) -> bool:
        """True if it cannot be cut at all."""
        return not self.points

    def allows(self, first: int, last: int) -> bool:
        """True if layers [first, last) may be a stage; within a period, short stages may begin off `points`, too."""
        if (first, last) == (0, self.layers):
            return True
        if self.is_whole or not 0 <= first < last <= self.layers:
            return False
        return not self.period or stage_period(self.period, first, last) > 0


def cut_rules(header: GGUFHeader) -> CutRules:
    """Say where a model may be cut; decided from what is known to work, not from what is known to fail."""
    count = header.block_count
    if reason := _whole_because(header):
        return CutRules((), reason, count)
    period = window_period(header)
    if period > 1:
        points = tuple(range(period, count, period))
        text = f"a period of {period} layers shares a sliding window"
        return CutRules(points, text if points else f"{text}, and it has only {count}", count, period)
    return CutRules(tuple(range(1, count)), "" if count > 1 else "it has one layer", count)


def _whole_because(header: GGUFHeader) -> str:
    arch, count = header.architecture, header.block_count
    if arch not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        return f"models of the architecture {arch} are not known to give the same answers in parts ({known} are)"
    if (arch, count) in _SCALE_BY_DEPTH:
        return f"llama.cpp takes {arch}'s scale of attention from its number of layers"
    if header.of_architecture("nextn_predict_layers"):
        return "its last layers predict further tokens from the hidden state of the others"
    if isinstance(header.metadata.get(f"{arch}.attention.sliding_window_pattern"), tuple):
        return "its sliding windows follow no period"
    names = {tensor.name for tensor in header.tensors}
    if "token_embd.weight" not in names or "output_norm.weight" not in names:
        return "it has no embedding of tokens, or no last norm"
    for tensor in header.tensors:
        block = BLOCK.match(tensor.name)
        if block and int(block[1]) >= count:
            return f"the tensor {tensor.name} belongs to none of its {count} layers"
        if not block and not tensor.name.startswith(("token_embd.weight", "output.", "output_norm.", *EVERYWHERE)):
            return f"it has the tensor {tensor.name}, which belongs to no layer"
    layers = {int(block[1]) for name in names if (block := BLOCK.match(name))}
    if layers != set(range(count)):
        return f"it has tensors for {len(layers)} of its {count} layers"
    return ""


def window_period(header: GGUFHeader) -> int:
    """Return the period in which layers look beyond the sliding window; 0: all do."""
    rule = ARCHITECTURES.get(header.architecture)
    if rule is None or not rule.window_period or not header.of_architecture("attention.sliding_window"):
        return 0
    return header.of_architecture("attention.sliding_window_pattern") or rule.window_period


def stage_period(period: int, first: int, last: int) -> int:
    """Return the period that gives layers [first, last), counted from 0, the windows they have; 0: none does.

    llama.cpp has layer n look beyond the window where n % period is period - 1, and aborts where no layer has one.
    """
    if first % period == 0:
        return period
    beyond = [layer - first for layer in range(first, last) if layer % period == period - 1]
    if not beyond:
        return last - first + 1
    own = beyond[0] + 1
    return own if own > 1 and beyond == list(range(own - 1, last - first, own)) else 0


@dataclass(frozen=True, slots=True)
class LayerCosts:
    """What the parts of a model weigh, in bytes; one item a layer."""

    layers: tuple[int, ...]
    embedding: int
    """What the first stage has on top: the embedding of tokens."""
    output: int
    """What the last stage has on top: last norm and output layer (the embedding again where they are one)."""
    everywhere: int
    """What each stage has on top."""
    cache_values: tuple[int, ...]
    """Numbers that one token adds to the layer's KV cache."""
    windows: tuple[int, ...]
    """So many tokens at most are kept by the layer; 0: all."""

    def cache_bytes(self, layer: int, tokens: int, value_bytes: float = 2.0) -> int:
        """Return what the layer's KV cache takes for so many tokens of one sequence."""
        kept = min(tokens, self.windows[layer]) if self.windows[layer] else tokens
        return math.ceil(self.cache_values[layer] * kept * value_bytes)

    def stage_bytes(self, first: int, last: int, tokens: int = 0, value_bytes: float = 2.0) -> int:
        """Return weights and KV cache of a stage with layers [first, last), for so many tokens in all."""
        total = sum(self.layers[first:last]) + self.everywhere
        total += self.embedding if first == 0 else 0
        total += self.output if last == len(self.layers) else 0
        return total + sum(self.cache_bytes(layer, tokens, value_bytes) for layer in range(first, last))


def layer_costs(header: GGUFHeader) -> LayerCosts:
    """Add up what each layer of a model weighs; for any architecture."""
    count = header.block_count
    layers = [0] * count
    embedding = output = everywhere = norm = 0
    for tensor in header.tensors:
        block = BLOCK.match(tensor.name)
        if block:
            if int(block[1]) < count:
                layers[int(block[1])] += tensor.size_bytes
        elif tensor.name.startswith("token_embd."):
            embedding += tensor.size_bytes
        elif tensor.name.startswith("output_norm."):
            norm += tensor.size_bytes
        elif tensor.name.startswith("output."):
            output += tensor.size_bytes
        else:
            everywhere += tensor.size_bytes
    windows = _windows(header)
    values = tuple(_cache_values(header, layer, windows[layer] > 0) for layer in range(count))
    return LayerCosts(tuple(layers), embedding, (output or embedding) + norm, everywhere, values, windows)


def _cache_values(header: GGUFHeader, layer: int, is_windowed: bool) -> int:
    heads = _of_layer(header, "attention.head_count", layer)
    if not heads:
        return 0
    width = header.embedding_length // heads
    lengths = 0
    for part in ("key", "value"):
        length = header.of_architecture(f"attention.{part}_length", width)
        lengths += header.of_architecture(f"attention.{part}_length_swa", length) if is_windowed else length
    return _of_layer(header, "attention.head_count_kv", layer, heads) * lengths


def _of_layer(header: GGUFHeader, key: str, layer: int, default: int = 0) -> int:
    value = header.metadata.get(f"{header.architecture}.{key}")
    if isinstance(value, tuple):
        value = value[layer] if layer < len(value) else default
    return value if isinstance(value, int) and not isinstance(value, bool) else default


def _windows(header: GGUFHeader) -> tuple[int, ...]:
    count, window = header.block_count, header.of_architecture("attention.sliding_window")
    pattern = header.metadata.get(f"{header.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, tuple) and len(pattern) >= count:
        return tuple(window if pattern[layer] else 0 for layer in range(count))
    period = window_period(header)
    if not period:
        return (0,) * count
    return tuple(window if layer % period < period - 1 else 0 for layer in range(count))


def is_of_stage(tensor: TensorInfo, first: int, last: int) -> bool:
    """True if a tensor is one of layers [first, last) or of every stage."""
    block = BLOCK.match(tensor.name)
    return first <= int(block[1]) < last if block else tensor.name.startswith(EVERYWHERE)
