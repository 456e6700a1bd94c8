"""Types of elements inside the kernels.

Triton's interpreter has no bfloat16 arithmetic: it multiplies the bits. So kernels compute in float32, or in the type
that `operand_type` names for matrix products, and convert where they load and store.
"""

import torch
import triton
import triton.language as tl

from wherry_runtime.kernels.cuda.support import interpreted
from wherry_runtime.kvcache.formats import KVFormat

PLAIN, FP8, INT8 = 0, 1, 2  # kinds of KV cache: floats as they are, E4M3 without a scale, int8 with one behind a head

# Products and sums may be fused into one instruction with one rounding. Stated, because Triton's default is changing.
FUSED = {"enable_fp_fusion": True}

_TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}


def operand_type(dtype: torch.dtype) -> tl.dtype:
    """What operands of matrix products are, for activations of `dtype`. Sums are float32 always."""
    return tl.float32 if interpreted() and dtype is torch.bfloat16 else _TYPES[dtype]


def cache_kind(stored: KVFormat) -> int:
    """PLAIN, FP8 or INT8."""
    return INT8 if stored.scaled else FP8 if stored.quantized else PLAIN


def block(size: int, least: int = 16) -> int:
    """The next power of two, as Triton wants its tiles; matrix products want 16 at least."""
    return 1 << (max(least, size) - 1).bit_length()


@triton.jit
def from_fp8(code):
    """uint8 → float16: E4M3, exactly. No instruction of newer GPUs is needed: E4M3's bits, moved, are a float16's whose
    exponent is 8 too small, subnormal numbers included."""
    wide = code.to(tl.uint16)
    bits = ((wide & 0x80) << 8) | ((wide & 0x7F) << 7)
    value = bits.to(tl.float16, bitcast=True) * 256.0
    return tl.where((wide & 0x7F) == 0x7F, float("nan"), value)


@triton.jit
def to_fp8(x):
    """float32 → uint8: E4M3, rounded to nearest (ties to even), saturating at 448; NaN stays NaN."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 0x80
    size = tl.minimum(tl.abs(x), 448.0)
    wide = size.to(tl.int32, bitcast=True)
    # 20 of the 23 bits of the fraction go, and the exponent's bias from 127 to 7.
    normal = ((wide + 0x7FFFF + ((wide >> 20) & 1)) >> 20) - (120 << 3)
    # Below 2⁻⁶ a step is 2⁻⁹: that of a float32 at 2¹⁴, so the addition rounds and leaves the code in the low bits.
    small = (size + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    code = tl.where(size < 0.015625, small, normal)
    return (tl.where(x != x, 0x7F, code) | sign).to(tl.uint8)
