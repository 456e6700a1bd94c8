"""Blocks taken apart into whole numbers and scales, for those types that the engine computes with as they are.

`HELD` tells the format that holds each exactly; what is not in it is dequantized when it is loaded.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.blocks.bits import U8, as_type, planes, split
from wherry_runtime.formats.gguf.blocks.integers import fifth_bits
from wherry_runtime.formats.gguf.blocks.k_quants import scales_and_minima
from wherry_runtime.quantization.formats import Format

I8 = npt.NDArray[np.int8]
Bytes = npt.NDArray[Any]

HELD = {
    "Q4_0": Format("int4", 32),
    "Q8_0": Format("int8", 32),
    "Q4_1": Format("k4", 32, 32, minima=True),
    "Q5_0": Format("k5", 32, 32, zero=16),
    "Q5_1": Format("k5", 32, 32, minima=True),
    "Q2_K": Format("k4", 16, 256, minima=True),
    "Q3_K": Format("k4", 16, 256, zero=4),
    "Q4_K": Format("k4", 32, 256, minima=True),
    "Q5_K": Format("k5", 32, 256, minima=True),
    "Q6_K": Format("k6", 16, 256, zero=32),
}


class Parts(NamedTuple):
    """What n blocks are made of: w = (d · scale) code - (d_min · minimum).

    Attributes:
        codes: [n, elements] int8.
        d, d_min: [n, 1] float16.
        scales, minima: [n, groups] int8.
    """

    codes: I8
    d: Bytes
    scales: I8
    d_min: Bytes | None = None
    minima: I8 | None = None


def _half(raw: U8) -> Bytes:
    return as_type(raw, "<f2")


def _ones(blocks: U8, value: int = 1) -> I8:
    return np.full((len(blocks), 1), value, np.int8)


def _q4_0(blocks: U8) -> Parts:
    d, packed = split(blocks, 2)
    return Parts(planes(packed, 16, 4).astype(np.int8) - np.int8(8), _half(d), _ones(blocks))


def _q8_0(blocks: U8) -> Parts:
    d, q = split(blocks, 2)
    return Parts(as_type(q, "i1"), _half(d), _ones(blocks))


def _q4_1(blocks: U8) -> Parts:
    """d q + m is d q - (-m)."""
    d, m, packed = split(blocks, 2, 2)
    return Parts(planes(packed, 16, 4).astype(np.int8), _half(d), _ones(blocks), _half(m), _ones(blocks, -1))


def _q5_0(blocks: U8) -> Parts:
    d, high, packed = split(blocks, 2, 4)
    q = planes(packed, 16, 4) | fifth_bits(high)
    return Parts(q.astype(np.int8) - np.int8(16), _half(d), _ones(blocks))


def _q5_1(blocks: U8) -> Parts:
    d, m, high, packed = split(blocks, 2, 2, 4)
    q = (planes(packed, 16, 4) | fifth_bits(high)).astype(np.int8)
    return Parts(q, _half(d), _ones(blocks), _half(m), _ones(blocks, -1))


def _q2_k(blocks: U8) -> Parts:
    packed_scales, packed, d, d_min = split(blocks, 16, 64, 2)
    scales, minima = (packed_scales & 15).astype(np.int8), (packed_scales >> 4).astype(np.int8)
    return Parts(planes(packed, 32, 2).astype(np.int8), _half(d), scales, _half(d_min), minima)


def _q3_k(blocks: U8) -> Parts:
    mask, packed, packed_scales, d = split(blocks, 32, 64, 12)
    low, high = planes(packed_scales[:, :8], 8, 4), planes(packed_scales[:, 8:], 4, 2)
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    q = planes(packed, 32, 2) | (planes(mask, 32, 1) << 2)
    return Parts(q.astype(np.int8) - np.int8(4), _half(d), scales)


def _q4_k(blocks: U8) -> Parts:
    d, d_min, packed_scales, packed = split(blocks, 2, 2, 12)
    scales, minima = scales_and_minima(packed_scales)
    return Parts(planes(packed, 32, 4).astype(np.int8), _half(d), as_i8(scales), _half(d_min), as_i8(minima))


def _q5_k(blocks: U8) -> Parts:
    d, d_min, packed_scales, high, packed = split(blocks, 2, 2, 12, 32)
    scales, minima = scales_and_minima(packed_scales)
    q = planes(packed, 32, 4) | (planes(high, 32, 1) << 4)
    return Parts(as_i8(q), _half(d), as_i8(scales), _half(d_min), as_i8(minima))


def _q6_k(blocks: U8) -> Parts:
    low, high, scales, d = split(blocks, 128, 64, 16)
    q = (planes(low, 64, 4) | (planes(high, 32, 2) << 4)).astype(np.int8) - np.int8(32)
    return Parts(q, _half(d), as_type(scales, "i1"))


def as_i8(values: U8) -> I8:
    """Small numbers, as signed ones."""
    return values.astype(np.int8)


_TAKE_APART: dict[str, Callable[[U8], Parts]] = {
    "Q4_0": _q4_0, "Q8_0": _q8_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip


def taken_apart(blocks: U8, name: str) -> Parts:
    """Blocks [n, bytes] of a type in `HELD`."""
    return _TAKE_APART[name](blocks)
