"""int8: w ≈ q · scale, q in [-127, 127], a float16 scale for each group of inputs."""

import torch

from wherry_runtime.quantization.formats import PANEL
from wherry_runtime.quantization.tensors import split


def quantize(weights: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to nearest (ties to even) against the scale as float16 has it.

    Args:
        weights: [N, K] float32, K a multiple of `group`.

    Returns:
        [N, K] int8 and [N, K / group] float16.
    """
    grouped = split(weights, -1, (-1, group))
    scales = (grouped.abs().amax(dim=-1) / 127).half()
    wide = scales.float()
    inverse = torch.where(wide == 0, 0.0, 1 / wide)
    codes = (grouped * inverse.unsqueeze(-1)).clamp_(-127, 127).round_()
    return codes.to(torch.int8).flatten(1), scales


def pack(codes: torch.Tensor) -> torch.Tensor:
    """[N, Kp] int8 → [P, Kp / 4, 64, 4] uint8 of q + 128, N a multiple of 64."""
    shifted = codes.view(torch.uint8) ^ 0x80
    return split(split(shifted, 0, (-1, PANEL)), 2, (-1, 4)).transpose(1, 2).contiguous()


def unpack(data: torch.Tensor) -> torch.Tensor:
    """Undoes `pack`."""
    return (data ^ 0x80).view(torch.int8).transpose(1, 2).flatten(2).flatten(0, 1)
