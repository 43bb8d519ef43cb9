"""Which quantization may stand in for which, and which is best."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

FULL: Final = frozenset({"f32", "f16", "bf16"})
"""What a smaller quantization can be made of without a second loss."""

_PLAIN: Final[dict[str, tuple[str, ...]]] = {
    "q4_0": ("q4_0", "q4_1", "q5_0", "q5_1", "q8_0"),
    "q4_1": ("q4_1", "q5_1", "q8_0"),
    "q5_0": ("q5_0", "q5_1", "q8_0"),
    "q5_1": ("q5_1", "q8_0"),
    "q8_0": ("q8_0",),
    "f16": ("f16",),
    "bf16": ("bf16",),
    "f32": ("f32",),
}
_K: Final = ("q2_k_s", "q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_k_s", "q4_k_m", "q5_k_s", "q5_k_m", "q6_k")
"""Smallest first."""


def compatible(asked: str) -> tuple[str, ...]:
    """Return the quantizations that may serve a request for one, best first: itself, then by size."""
    key = asked.lower()
    if key in _K:
        return _K[_K.index(key) :]
    return _PLAIN.get(key, (key,))


def serves(asked: str, has: str) -> bool:
    """Tell whether a file quantized as `has` may serve a request for `asked`."""
    return has.lower() in compatible(asked)


def pick(asked: str, present: Iterable[str]) -> str | None:
    """Return which of the quantizations that are present serves a request best; None: none does."""
    by_key = {name.lower(): name for name in present}
    return next((by_key[key] for key in compatible(asked) if key in by_key), None)


def source(present: Iterable[str]) -> str | None:
    """Return which of them to quantize from, None where each has lost already."""
    by_key = {name.lower(): name for name in present}
    return next((by_key[key] for key in ("f32", "bf16", "f16") if key in by_key), None)


def is_asked_by_name(name: str) -> bool:
    """Tell whether a model's tag itself asks for full precision, as in `llama3:8b-fp16`."""
    tag = name.rpartition(":")[2].lower() if ":" in name else ""
    return any(word in {"f16", "fp16", "bf16", "f32", "fp32"} for word in tag.replace("_", "-").split("-"))
