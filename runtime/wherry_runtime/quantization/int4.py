"""int4: w ≈ q · scale, q in [-8, 7], a float16 scale for each group of inputs."""

import torch

from wherry_runtime.quantization.formats import PANEL
from wherry_runtime.quantization.tensors import split


def quantize(weights: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to nearest (ties to even) against a scale whose sign puts the largest magnitude at -8.

    Args:
        weights: [N, K] float32, K a multiple of `group`.

    Returns:
        [N, K] int8 and [N, K / group] float16.
    """
    grouped = split(weights, -1, (-1, group))
    low, high = grouped.amin(dim=-1), grouped.amax(dim=-1)
    scales = (torch.where(high > -low, high, low) / -8).half()
    wide = scales.float()
    inverse = torch.where(wide == 0, 0.0, 1 / wide)
    codes = (grouped * inverse.unsqueeze(-1)).round_().clamp_(-8, 7)
    return codes.to(torch.int8).flatten(1), scales


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[N, Kp] int8 → [P, Kp / 4, 32, 4] uint8, N a multiple of 64: q + 8 of column c in the low half of a byte,
    of column c + 32 in its high half."""
    shifted = split(split((codes + 8).view(torch.uint8), 0, (-1, 2, PANEL // 2)), 3, (-1, 4))
    low, high = shifted[:, 0].transpose(1, 2), shifted[:, 1].transpose(1, 2)
    return torch.bitwise_or(low, high << 4).contiguous()


def unpack(data: torch.Tensor) -> torch.Tensor:
    """Undoes `pack`."""
    columns = torch.cat((data & 15, data >> 4), dim=2).view(torch.int8) - 8
    return columns.transpose(1, 2).flatten(2).flatten(0, 1)
