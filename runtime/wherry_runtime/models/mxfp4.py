"""MXFP4 weights as checkpoints have them: the OCP Microscaling Formats specification 1.0, section 5."""

import torch

BLOCK = 32  # weights that share a scale
ROWS = 1 << 16  # blocks at a time: bounds the memory
# E2M1, by code: sign, two bits of exponent, one of mantissa.
VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
SCALE_BIAS = 127  # of E8M0


def dequantize(blocks: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Weights in bfloat16, which holds each of them exactly.

    Args:
        blocks: [..., groups, 16] uint8: two weights each, the first in the low half.
        scales: [..., groups] uint8: powers of two.

    Returns:
        [..., groups · 32].
    """
    values = torch.tensor(VALUES, dtype=torch.bfloat16)
    flat, exponents = blocks.reshape(-1, BLOCK // 2), scales.reshape(-1, 1).to(torch.int32) - SCALE_BIAS
    out = torch.empty(len(flat), BLOCK, dtype=torch.bfloat16)
    for start in range(0, len(flat), ROWS):
        part, rows = flat[start : start + ROWS], slice(start, start + ROWS)
        codes = torch.stack((part & 15, part >> 4), dim=-1).flatten(1)
        out[rows] = torch.ldexp(values[codes.long()], exponents[rows])
    return out.view(*scales.shape[:-1], -1)
