"""K-quants: 256 elements in groups of 16 or 32 whose scales are whole numbers themselves, times one float16 scale
(https://github.com/ggml-org/llama.cpp/pull/1684)."""

import numpy as np

from wherry_runtime.formats.gguf.blocks.bits import F32, U8, as_type, half, planes, split


def scales_and_minima(packed: U8) -> tuple[U8, U8]:
    """The eight 6-bit scales and eight 6-bit minima of Q4_K and Q5_K: [n, 12] → two of [n, 8].

    The first four of each are the low bits of bytes 0-3 and 4-7; the others have their low four bits in bytes 8-11 and
    their high two in what bytes 0-7 have left.
    """
    scale, least, low = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = np.concatenate([scale & 63, (low & 15) | ((scale >> 2) & 48)], axis=1)
    minima = np.concatenate([least & 63, (low >> 4) | ((least >> 2) & 48)], axis=1)
    return scales, minima


def _scaled(d: F32, scales: U8, q: U8, dmin: F32, minima: U8) -> F32:
    """(d s) q - (dmin m), a scale and a minimum for each run of q."""
    runs = q.reshape(len(q), scales.shape[1], -1).astype(np.float32)
    values = (d * scales.astype(np.float32))[..., None] * runs - (dmin * minima.astype(np.float32))[..., None]
    return values.reshape(len(q), -1)


def q2_k(blocks: U8) -> F32:
    """2 bits, 4-bit scales and minima of 16 elements."""
    packed_scales, packed, d, dmin = split(blocks, 16, 64, 2)
    return _scaled(half(d), packed_scales & 15, planes(packed, 32, 2), half(dmin), packed_scales >> 4)


def q3_k(blocks: U8) -> F32:
    """3 bits, signed 6-bit scales of 16 elements; the third bit says that 4 is not taken away."""
    mask, packed, packed_scales, d = split(blocks, 32, 64, 12)
    low = planes(packed_scales[:, :8], 8, 4)
    high = planes(packed_scales[:, 8:], 4, 2)
    scales = (low | (high << 4)).astype(np.int8) - np.int8(32)
    q = planes(packed, 32, 2).astype(np.int8) - ((planes(mask, 32, 1) ^ 1) << 2).astype(np.int8)
    values = (half(d) * scales.astype(np.float32))[..., None] * q.reshape(len(q), 16, 16).astype(np.float32)
    return values.reshape(len(q), -1)


def q4_k(blocks: U8) -> F32:
    """4 bits, 6-bit scales and minima of 32 elements."""
    d, dmin, packed_scales, packed = split(blocks, 2, 2, 12)
    scales, minima = scales_and_minima(packed_scales)
    return _scaled(half(d), scales, planes(packed, 32, 4), half(dmin), minima)


def q5_k(blocks: U8) -> F32:
    """Q4_K with a fifth bit."""
    d, dmin, packed_scales, high, packed = split(blocks, 2, 2, 12, 32)
    scales, minima = scales_and_minima(packed_scales)
    q = planes(packed, 32, 4) | (planes(high, 32, 1) << 4)
    return _scaled(half(d), scales, q, half(dmin), minima)


def q6_k(blocks: U8) -> F32:
    """6 bits, signed 8-bit scales of 16 elements."""
    low, high, scales, d = split(blocks, 128, 64, 16)
    q = (planes(low, 64, 4) | (planes(high, 32, 2) << 4)).astype(np.int8) - np.int8(32)
    values = (half(d) * as_type(scales, "i1").astype(np.float32))[..., None]
    return (values * q.reshape(len(q), 16, 16).astype(np.float32)).reshape(len(q), -1)


DEQUANTIZE = {"Q2_K": q2_k, "Q3_K": q3_k, "Q4_K": q4_k, "Q5_K": q5_k, "Q6_K": q6_k}
