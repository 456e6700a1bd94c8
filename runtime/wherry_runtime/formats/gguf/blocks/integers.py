"""Blocks of 32 whole numbers with one scale, and with `_1` a minimum beside it (ggml-quants.c)."""

import numpy as np

from wherry_runtime.formats.gguf.blocks.bits import F32, U8, as_type, fields, half, planes, split


def fifth_bits(bits: U8) -> U8:
    """The fifth bits, in a word of 32: [n, 4] → [n, 32]."""
    return np.asarray(fields(as_type(bits, "<u4")[:, 0], 1, range(32)), np.uint8) << np.uint8(4)


def q4_0(blocks: U8) -> F32:
    """d (q - 8)."""
    d, packed = split(blocks, 2)
    return half(d) * (planes(packed, 16, 4).astype(np.int8) - np.int8(8)).astype(np.float32)


def q4_1(blocks: U8) -> F32:
    """d q + m."""
    d, m, packed = split(blocks, 2, 2)
    return half(d) * planes(packed, 16, 4).astype(np.float32) + half(m)


def q5_0(blocks: U8) -> F32:
    """d (q - 16)."""
    d, high, packed = split(blocks, 2, 4)
    q = planes(packed, 16, 4) | fifth_bits(high)
    return half(d) * (q.astype(np.int8) - np.int8(16)).astype(np.float32)


def q5_1(blocks: U8) -> F32:
    """d q + m."""
    d, m, high, packed = split(blocks, 2, 2, 4)
    return half(d) * (planes(packed, 16, 4) | fifth_bits(high)).astype(np.float32) + half(m)


def q8_0(blocks: U8) -> F32:
    """d q."""
    d, q = split(blocks, 2)
    return as_type(q, "i1").astype(np.float32) * half(d)


def q8_k(blocks: U8) -> F32:
    """d q, d in float32; the sums of 16 at the end are of no use here."""
    d, q, _ = split(blocks, 4, 256)
    return as_type(d, "<f4") * as_type(q, "i1").astype(np.float32)


DEQUANTIZE = {"Q4_0": q4_0, "Q4_1": q4_1, "Q5_0": q5_0, "Q5_1": q5_1, "Q8_0": q8_0, "Q8_K": q8_k}
