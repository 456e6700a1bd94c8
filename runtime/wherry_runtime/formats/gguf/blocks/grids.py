"""IQ1, IQ2 and IQ3: vectors of 8 (or 4) elements from a codebook, with signs and scales (ggml-quants.c)."""

from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.blocks.bits import F32, U8, as_type, fields, half, split
from wherry_runtime.formats.gguf.blocks.codebooks import codebook

# Seven signs are stored; the eighth makes the number of negative ones even.
_SEVEN = np.arange(128, dtype=np.uint8)
_EIGHT = _SEVEN | ((np.bitwise_count(_SEVEN) & 1) << 7)
_DELTA = np.float32(0.125)
U16 = npt.NDArray[Any]


def _signs(bits: U8) -> F32:
    """-1 where a bit is set: [n, k] → [n, 8 k]."""
    ones = fields(bits, 1, range(8)).reshape(len(bits), -1)
    return np.where(ones == 1, np.float32(-1), np.float32(1))


def _seven_signs(words: npt.NDArray[np.uint32]) -> F32:
    """Four sets of seven signs in the low 28 bits of each word: [n, k] → [n, 32 k]."""
    return _signs(_EIGHT[fields(words, 7, range(0, 28, 7)).reshape(len(words), -1)])


def _spread(scales: F32, vectors: F32, signs: F32) -> F32:
    """scale · vector · sign, a scale for each run of elements."""
    runs = vectors.reshape(len(vectors), scales.shape[1], -1)
    return (scales[..., None] * runs * signs.reshape(runs.shape)).reshape(len(vectors), -1)


def _nibble_scales(d: F32, packed: U8, step: float) -> F32:
    """d (1/2 + s) step, with s in 4 bits: [n, k] → [n, 2 k]."""
    scales = fields(packed, 4, [0, 4]).reshape(len(packed), -1)
    return np.asarray(d * (np.float32(0.5) + scales) * np.float32(step), np.float32)


def iq2_xxs(blocks: U8) -> F32:
    """A byte for 8 elements; a word for 32 has their signs and a 4-bit scale."""
    d, packed = split(blocks, 2)
    words = as_type(packed, "<u4").reshape(len(blocks), 8, 2)
    indices = as_type(words[..., 0], "u1").reshape(len(blocks), -1)
    info = words[..., 1]
    scales = half(d) * (np.float32(0.5) + (info >> 28).astype(np.float32)) * np.float32(0.25)
    return _spread(scales, codebook("IQ2_XXS")[indices], _seven_signs(info))


def iq2_xs(blocks: U8) -> F32:
    """9 bits for 8 elements and 7 of signs in a word of 16; 4-bit scales of 16 elements."""
    d, packed, packed_scales = split(blocks, 2, 64)
    words = as_type(packed, "<u2")
    scales = _nibble_scales(half(d), packed_scales, 0.25)
    return _spread(scales, codebook("IQ2_XS")[words & 511], _signs(_EIGHT[words >> 9]))


def iq2_s(blocks: U8) -> F32:
    """10 bits for 8 elements, the upper two apart; a byte of signs; 4-bit scales of 16 elements."""
    d, low, signs, high, packed_scales = split(blocks, 2, 32, 32, 8)
    upper = fields(high, 2, range(0, 8, 2)).reshape(len(blocks), -1).astype(np.uint16)
    scales = _nibble_scales(half(d), packed_scales, 0.25)
    return _spread(scales, codebook("IQ2_S")[low | (upper << 8)], _signs(signs))


def iq3_xxs(blocks: U8) -> F32:
    """A byte for 4 elements; a word for 32 has their signs and a 4-bit scale."""
    d, indices, packed = split(blocks, 2, 64)
    info = as_type(packed, "<u4")
    scales = half(d) * (np.float32(0.5) + (info >> 28).astype(np.float32)) * np.float32(0.5)
    return _spread(scales, codebook("IQ3_XXS")[indices], _seven_signs(info))


def iq3_s(blocks: U8) -> F32:
    """9 bits for 4 elements, the upper one apart; a byte of signs for 8; odd 4-bit scales of 32 elements."""
    d, low, high, signs, packed_scales = split(blocks, 2, 64, 8, 32)
    upper = fields(high, 1, range(8)).reshape(len(blocks), -1).astype(np.uint16)
    scales = fields(packed_scales, 4, [0, 4]).reshape(len(blocks), -1)
    steps = np.asarray(half(d) * (1 + 2 * scales), np.float32)
    return _spread(steps, codebook("IQ3_S")[low | (upper << 8)], _signs(signs))


def _shifted(steps: F32, indices: U16, negative: npt.NDArray[np.bool_]) -> F32:
    """step (vector ± 1/8), a step and a direction for each run of vectors."""
    runs = codebook("IQ1")[indices].reshape(len(indices), negative.shape[1], -1)
    moved = runs + np.where(negative, -_DELTA, _DELTA)[..., None]
    wide = moved.reshape(len(indices), steps.shape[1], -1)
    return (steps[..., None] * wide).reshape(len(indices), -1)


def iq1_s(blocks: U8) -> F32:
    """11 bits for 8 elements; a word of 16 for 32 has the upper three of each, an odd 3-bit scale and a direction."""
    d, low, packed = split(blocks, 2, 32)
    info = as_type(packed, "<u2")
    upper = fields(info, 3, range(0, 12, 3)).reshape(len(blocks), -1)
    steps = np.asarray(half(d) * (2 * ((info >> 12) & 7) + 1), np.float32)
    return _shifted(steps, low | (upper << 8), (info & 0x8000) != 0)


def iq1_m(blocks: U8) -> F32:
    """As IQ1_S, with a direction for each 8 elements and a scale for 16; d is in the top bits of four words."""
    low, packed, packed_scales = split(blocks, 32, 16)
    words = as_type(packed_scales, "<u2")
    tops = words >> 12
    d = (tops[:, 0] | (tops[:, 1] << 4) | (tops[:, 2] << 8) | (tops[:, 3] << 12)).view(np.float16)
    scales = fields(words, 3, range(0, 12, 3)).reshape(len(blocks), -1)
    steps = np.asarray(d.astype(np.float32)[:, None] * (2 * scales + 1), np.float32)
    info = fields(packed, 4, [0, 4]).reshape(len(blocks), -1)
    return _shifted(steps, low | ((info & 7).astype(np.uint16) << 8), (info & 8) != 0)


DEQUANTIZE = {
    "IQ2_XXS": iq2_xxs,
    "IQ2_XS": iq2_xs,
    "IQ2_S": iq2_s,
    "IQ3_XXS": iq3_xxs,
    "IQ3_S": iq3_s,
    "IQ1_S": iq1_s,
    "IQ1_M": iq1_m,
}
