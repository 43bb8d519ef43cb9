"""How activations are packed for the network: f32 as they are, f16, or q8 (blocks of 32 with one f16 scale)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

from osync.errors import NotSupported, WireError

Buffer = bytes | bytearray | memoryview
Dtype = Literal["f32", "f16", "q8"]
DTYPES: Final[tuple[Dtype | None, ...]] = (None, "f32", "f16", "q8")
CODES: Final[dict[Dtype, int]] = {dtype: code for code, dtype in enumerate(DTYPES) if dtype is not None}
BLOCK: Final = 32
_BLOCK_BYTES: Final = BLOCK + 2
_F16_MAX: Final = 65504.0


@dataclass(frozen=True, slots=True)
class Activations:
    """Rows of `width` numbers in `dtype`, one after the other."""

    dtype: Dtype
    width: int
    data: Buffer


def byte_count(dtype: str, width: int, count: int) -> int:
    """Return how many bytes `count` rows take. Raises WireError for a width that q8 cannot have."""
    if dtype == "f32":
        return width * count * 4
    if dtype == "f16":
        return width * count * 2
    if width % BLOCK:
        raise WireError(f"q8 activations need a width in multiples of {BLOCK}, not {width}")
    return width * count // BLOCK * _BLOCK_BYTES


def pack(values: Buffer, width: int, dtype: Dtype) -> Activations:
    """Pack rows of little-endian f32. f32 is not copied. What f16 cannot hold becomes its largest number.

    q8 rounds to 1/127 of the largest number of its block of 32; NaN becomes 0 there.
    """
    if dtype == "f32":
        return Activations(dtype, width, values)
    numpy = _numpy()
    numbers = numpy.frombuffer(values, dtype="<f4")
    if dtype == "f16":
        half = numpy.clip(numbers, -_F16_MAX, _F16_MAX).astype("<f2")
        return Activations(dtype, width, memoryview(half).cast("B"))
    byte_count(dtype, width, 1)
    blocks = numpy.nan_to_num(numbers.reshape(-1, BLOCK), posinf=_F16_MAX * 127, neginf=-_F16_MAX * 127)
    largest = numpy.maximum(blocks.max(axis=1), -blocks.min(axis=1))
    scales = numpy.minimum(largest / 127, _F16_MAX).astype("<f2")
    factors = scales.astype("<f4")
    numpy.divide(1, factors, out=factors, where=factors > 0)
    numpy.multiply(blocks, factors[:, None], out=blocks)
    numpy.clip(numpy.rint(blocks, out=blocks), -127, 127, out=blocks)
    packed = numpy.empty((len(blocks), _BLOCK_BYTES), dtype="i1")
    packed[:, :2] = scales.view("i1").reshape(-1, 2)
    packed[:, 2:] = blocks
    return Activations(dtype, width, memoryview(packed).cast("B"))


def unpack(activations: Activations) -> Buffer:
    """Return the rows as little-endian f32; f32 is not copied."""
    if activations.dtype == "f32":
        return activations.data
    numpy = _numpy()
    if activations.dtype == "f16":
        wide = numpy.frombuffer(activations.data, dtype="<f2").astype("<f4")
        return memoryview(wide).cast("B")
    packed = numpy.frombuffer(activations.data, dtype="i1").reshape(-1, _BLOCK_BYTES)
    scales = numpy.ascontiguousarray(packed[:, :2]).view("<f2").astype("<f4")
    return memoryview(packed[:, 2:] * scales).cast("B")


def _numpy() -> Any:
    try:
        import numpy
    except ImportError:
        raise NotSupported("f16 and q8 activations need numpy: pip install osync[engine], or use f32") from None
    return numpy
