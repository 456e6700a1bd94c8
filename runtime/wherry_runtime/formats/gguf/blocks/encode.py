"""float32 into the types that Wherry writes. A function of each takes [n, elements] float32 and gives [n, bytes] uint8.

Q4_0, Q5_0 and Q8_0 are those of ggml's reference, bit for bit. K-quants are searched for: see `encode_k`.
"""

from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.blocks import PIECE
from wherry_runtime.formats.gguf.blocks.bits import F32, U8, half_bytes, packed_planes
from wherry_runtime.formats.gguf.blocks.encode_k import q4_k, q5_k, q6_k
from wherry_runtime.formats.gguf.types import GGMLType
from wherry_runtime.loading.errors import ModelError


def f32(values: F32) -> U8:
    """As they are."""
    return values.astype("<f4").view(np.uint8)


def f16(values: F32) -> U8:
    """Rounded to nearest even."""
    return half_bytes(values)


def bf16(values: F32) -> U8:
    """Rounded to nearest even; NaN stays NaN."""
    bits = values.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 64
    return np.where(np.isnan(values), quiet, rounded).astype("<u2").view(np.uint8)


def _extreme(values: F32) -> F32:
    """Of each row, the value farthest from zero, the first if there are two: [n, 1]."""
    return np.take_along_axis(values, np.abs(values).argmax(axis=1, keepdims=True), axis=1)


def _inverse(d: F32) -> F32:
    with np.errstate(divide="ignore"):
        return np.where(d == 0, np.float32(0), 1 / d)


def q4_0(values: F32) -> U8:
    """d = extreme / -8."""
    d = _extreme(values) / -8
    q = np.trunc(values * _inverse(d) + np.float32(8.5)).clip(0, 15).astype(np.uint8)
    return np.concatenate([half_bytes(d), packed_planes(q, 16, 4)], axis=1)


def q5_0(values: F32) -> U8:
    """d = extreme / -16."""
    d = _extreme(values) / -16
    q = np.trunc(values * _inverse(d) + np.float32(16.5)).clip(0, 31).astype(np.uint8)
    high = np.packbits(q >> 4, axis=1, bitorder="little")
    return np.concatenate([half_bytes(d), high, packed_planes(q & 15, 16, 4)], axis=1)


def q8_0(values: F32) -> U8:
    """d = largest / 127; halves are rounded away from zero."""
    d = np.abs(values).max(axis=1, keepdims=True) / 127
    scaled = values * _inverse(d)
    whole = np.floor(np.abs(scaled))
    q = np.sign(scaled) * (whole + np.floor(2 * (np.abs(scaled) - whole)))
    return np.concatenate([half_bytes(d), q.astype(np.int8).view(np.uint8)], axis=1)


ENCODE: dict[str, Callable[[F32], U8]] = {
    "F32": f32,
    "F16": f16,
    "BF16": bf16,
    "Q4_0": q4_0,
    "Q5_0": q5_0,
    "Q8_0": q8_0,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
}
LARGEST_HALF = 65504.0


def encode(values: npt.NDArray[np.float32], kind: GGMLType) -> U8:
    """`values` [elements], whole blocks of `kind`, as bytes.

    Raises:
        ModelError: bad_weights, where they are not finite, or so large that a float16 does not hold them.
    """
    if kind.name not in ("F32", "BF16"):
        largest = float(np.abs(values).max(initial=0))
        if not largest <= LARGEST_HALF:
            raise ModelError("bad_weights", f"{kind.name} cannot hold {largest}; convert to F32 or BF16")
    blocks = np.ascontiguousarray(values, np.float32).reshape(-1, kind.block)
    step = max(1, PIECE // kind.block)
    parts = [ENCODE[kind.name](blocks[i : i + step]) for i in range(0, len(blocks), step)]
    return np.concatenate(parts).reshape(-1) if parts else np.empty(0, np.uint8)
