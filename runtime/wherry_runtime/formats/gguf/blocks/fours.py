"""4-bit codes into a table of 16 values: IQ4_NL and IQ4_XS (ggml), MXFP4 (OCP Microscaling Formats), NVFP4 (NVIDIA)."""

import numpy as np

from wherry_runtime.formats.gguf.blocks.bits import F32, U8, as_type, half, planes, split

# What IQ4 codes stand for: numbers of the format (ggml's kvalues_iq4nl), closer together around zero.
_IQ4 = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_E2M1 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0], np.float32)
# ggml doubles FP4's values and halves the scale, and has no negative zero.
_FP4 = np.concatenate([2 * _E2M1, 0 - 2 * _E2M1])
_HALF_E8M0 = np.ldexp(np.float32(1), np.arange(256) - 128).astype(np.float32)


def _half_e4m3() -> F32:
    """Half of each unsigned E4M3 code (bias 7); the top bit means nothing, and 0x7F is 0."""
    codes = np.arange(256)
    exponent, mantissa = (codes >> 3) & 15, codes & 7
    values = np.where(exponent == 0, np.ldexp(mantissa, -9), np.ldexp(1 + mantissa / 8, exponent - 7)) / 2
    values[0x7F] = 0
    return values.astype(np.float32)


_HALF_E4M3 = _half_e4m3()


def iq4_nl(blocks: U8) -> F32:
    """d v of 32 elements."""
    d, packed = split(blocks, 2)
    return half(d) * _IQ4[planes(packed, 16, 4)]


def iq4_xs(blocks: U8) -> F32:
    """d (s - 32) v with 6-bit scales of 32 elements: four bits in a byte's half, two in a word of 16."""
    d, high, low, packed = split(blocks, 2, 2, 4)
    shifts = np.arange(0, 16, 2, dtype=np.uint16)
    upper = ((as_type(high, "<u2") >> shifts) & np.uint16(3)).astype(np.uint8)
    lower = np.stack([low & 15, low >> 4], axis=2).reshape(len(blocks), 8)
    scales = (lower | (upper << 4)).astype(np.int8) - np.int8(32)
    values = _IQ4[planes(packed, 16, 4)].reshape(len(blocks), 8, 32)
    return ((half(d) * scales.astype(np.float32))[..., None] * values).reshape(len(blocks), -1)


def mxfp4(blocks: U8) -> F32:
    """2^e v of 32 elements."""
    exponent, packed = split(blocks, 1)
    return _HALF_E8M0[exponent] * _FP4[planes(packed, 16, 4)]


def nvfp4(blocks: U8) -> F32:
    """Four groups of 16 elements, each with a scale in E4M3."""
    scales, packed = split(blocks, 4)
    values = _FP4[planes(packed, 8, 4)].reshape(len(blocks), 4, 16)
    return (_HALF_E4M3[scales][..., None] * values).reshape(len(blocks), -1)


DEQUANTIZE = {"IQ4_NL": iq4_nl, "IQ4_XS": iq4_xs, "MXFP4": mxfp4, "NVFP4": nvfp4}
