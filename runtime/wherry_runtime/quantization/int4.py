"""int4: w ≈ q · scale, q in [-8, 7], a float16 scale for each group of inputs."""

import torch

from wherry_runtime.quantization.formats import PANEL
from wherry_runtime.quantization.tensors import split

# The largest magnitude of a group goes to -d for one of these d: beyond -8 it is clipped, and the others are finer.
# With -8 and -7 among them, weights that were trained to lie on sixteen or fifteen steps are kept exactly.
GRID = (-8.0, -7.0, -7.5, -7.75, -8.25, -8.5, -8.75, -9.25)
LANES = 16


def quantize(weights: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to nearest (ties to even) against the scale, as float16 has it, that leaves the least squared error.

    Args:
        weights: [N, K] float32, K a multiple of `group`.

    Returns:
        [N, K] int8 and [N, K / group] float16.
    """
    grouped = split(weights, -1, (-1, group))
    low, high = grouped.amin(dim=-1).clamp(max=0), grouped.amax(dim=-1).clamp(min=0)
    top = torch.where(high > -low, high, low)
    best, scales, least = _round(grouped, top / GRID[0])
    for d in GRID[1:]:
        codes, scale, error = _round(grouped, top / d)
        better = error < least
        best = torch.where(better.unsqueeze(-1), codes, best)
        scales, least = torch.where(better, scale, scales), torch.where(better, error, least)
    return best.to(torch.int8).flatten(1), scales


def _round(grouped: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Codes in float32, the scales as float16, and the squared error of each group.

    The error is summed in an order that any processor can follow: sixteen partial sums, then pairs of them.
    """
    rounded = scale.half() + 0.0  # no negative zero
    wide = rounded.float().unsqueeze(-1)
    inverse = torch.where(wide == 0, 0.0, 1 / wide)
    codes = (grouped * inverse).clamp_(-8, 7).round_()
    off = grouped - codes * wide
    partial = split(off * off, -1, (-1, LANES))
    error = partial[..., 0, :]
    for i in range(1, partial.shape[-2]):
        error = error + partial[..., i, :]
    while error.shape[-1] > 1:
        half = error.shape[-1] // 2
        error = error[..., :half] + error[..., half:]
    return codes, rounded, error.squeeze(-1)


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
