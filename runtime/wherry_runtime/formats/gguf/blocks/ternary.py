"""One to two bits: digits to base three (TQ1_0), two bits each (TQ2_0, Q2_0) and signs (Q1_0)."""

import numpy as np

from wherry_runtime.formats.gguf.blocks.bits import F32, U8, fields, half, planes, split


def _digits(packed: U8, count: int) -> U8:
    """The first `count` base-3 digits of each byte, which is a fraction of 256: [n, k] → [n, count * k].

    Multiplied by three, what runs over is the next digit; digits of the same place lie side by side.
    """
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:count]
    shifted = packed[:, None, :] * powers[:, None]  # modulo 256: whole digits leave at the top
    return ((shifted.astype(np.uint16) * 3) >> 8).astype(np.uint8).reshape(len(packed), -1)


def tq1_0(blocks: U8) -> F32:
    """d t of 256 elements, five in a byte but for the last 16, four in a byte."""
    first, second, last, d = split(blocks, 32, 16, 4)
    digits = np.concatenate([_digits(first, 5), _digits(second, 5), _digits(last, 4)], axis=1)
    return half(d) * (digits.astype(np.int8) - np.int8(1)).astype(np.float32)


def tq2_0(blocks: U8) -> F32:
    """d (q - 1) of 256 elements."""
    packed, d = split(blocks, 64)
    return half(d) * (planes(packed, 32, 2).astype(np.int8) - np.int8(1)).astype(np.float32)


def q2_0(blocks: U8) -> F32:
    """d (q - 1) of 64 elements, neighbours in a byte."""
    d, packed = split(blocks, 2)
    q = fields(packed, 2, range(0, 8, 2)).reshape(len(blocks), -1)
    return (q.astype(np.int8) - np.int8(1)).astype(np.float32) * half(d)


def q1_0(blocks: U8) -> F32:
    """d or -d of 128 elements, neighbours in a byte."""
    d, packed = split(blocks, 2)
    scale = half(d)
    return np.where(fields(packed, 1, range(8)).reshape(len(blocks), -1) == 1, scale, -scale)


DEQUANTIZE = {"TQ1_0": tq1_0, "TQ2_0": tq2_0, "Q2_0": q2_0, "Q1_0": q1_0}
