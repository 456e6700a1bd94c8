"""FP4 E2M1 in groups of 32 with a power of two for a scale: MXFP4 of the OCP Microscaling specification, 1.0."""

from dataclasses import dataclass

import torch

from wherry_runtime.quantization.tensors import split

GROUP = 32
GROUPS_AT_ONCE = 1 << 16  # that are unpacked: bounds the memory
VALUES = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
BIAS = 127
TOP_EXPONENT = 2  # of the largest value, 6


@dataclass(frozen=True, slots=True)
class MXFP4:
    """packed [N, K / 2] uint8, the even input in the low half of a byte; exponents [N, K / 32] uint8."""

    packed: torch.Tensor
    exponents: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""
        return unpack_mxfp4(self.packed, self.exponents).float()


def quantize_mxfp4(weights: torch.Tensor) -> MXFP4:
    """[N, K] float32, K a multiple of 32: the scale is the power of two that puts the largest magnitude of the group
    between 4 and 8, where what is over 6 becomes 6."""
    grouped = split(weights, 1, (-1, GROUP))
    top = grouped.abs().amax(dim=-1)
    exponents = torch.where(top > 0, torch.frexp(top).exponent - 1 - TOP_EXPONENT + BIAS, 0).clamp(0, 254)
    scaled = grouped * torch.exp2(BIAS - exponents.float()).unsqueeze(-1)
    middles = (VALUES[1:8] + VALUES[:7]) / 2
    magnitude = scaled.abs()
    codes = torch.bucketize(magnitude, middles)  # up to and with the middle: down
    tie = (magnitude == middles[codes.clamp(max=6)]) & (codes % 2 == 1)  # ties go to the even code
    codes = codes + tie + 8 * (scaled < 0)
    flat = codes.flatten(1).to(torch.uint8)
    return MXFP4(flat[:, ::2] | flat[:, 1::2] << 4, exponents.to(torch.uint8))


def unpack_mxfp4(packed: torch.Tensor, exponents: torch.Tensor) -> torch.Tensor:
    """Weights in bfloat16, which holds each of them exactly.

    Args:
        packed: [..., K / 2] uint8.
        exponents: [..., K / 32] uint8.

    Returns:
        [..., K].
    """
    values = VALUES.bfloat16()
    flat, powers = packed.reshape(-1, GROUP // 2), exponents.reshape(-1, 1).to(torch.int32) - BIAS
    out = torch.empty(len(flat), GROUP, dtype=torch.bfloat16)
    for start in range(0, len(flat), GROUPS_AT_ONCE):
        groups = slice(start, start + GROUPS_AT_ONCE)
        codes = torch.stack((flat[groups] & 15, flat[groups] >> 4), dim=-1).flatten(1)
        out[groups] = torch.ldexp(values[codes.long()], powers[groups])
    return out.view(*exponents.shape[:-1], -1)
