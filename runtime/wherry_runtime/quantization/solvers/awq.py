"""AWQ (Lin et al., 2023, https://arxiv.org/abs/2306.00978): inputs with large activations get finer steps, by scaling
weights up and what comes before down; then each group's range is clipped as far as that helps."""

import torch
from torch.nn import functional

from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.rounding import SHRINKS, Grid
from wherry_runtime.quantization.solvers.inputs import Inputs
from wherry_runtime.quantization.tensors import split

STEPS = 20  # exponents that are tried
ROWS_AT_ONCE = 1024


def find_scales(weights: torch.Tensor, inputs: Inputs, grid: Grid, tied: torch.Tensor | None = None) -> torch.Tensor:
    """[K] factors for weights [N, K]: mean |x|^a / mean |w|^b with the exponents that leave the least error.

    Args:
        tied: [K] int64; inputs of an equal number get an equal factor.
    """
    size = (inputs.total / max(inputs.rows, 1)).clamp(min=1e-6)
    grouped = grid.grouped(weights)
    share = (grouped.abs() / grouped.abs().amax(dim=-1, keepdim=True).clamp(min=1e-9)).flatten(1)[:, : weights.shape[1]]
    spread = share.mean(dim=0).clamp(min=1e-6)
    best, least = torch.ones_like(size), _error(weights, inputs, grid, torch.ones_like(size))
    for step in range(STEPS):
        for weight_power in (0.0, 1 - step / STEPS):
            scales = normalized(size ** (step / STEPS) / spread**weight_power, tied)
            error = _error(weights, inputs, grid, scales)
            if error < least:
                best, least = scales, error
    return best


def normalized(scales: torch.Tensor, tied: torch.Tensor | None) -> torch.Tensor:
    """Around one, tied ones averaged."""
    if tied is not None:
        count = torch.zeros(int(tied.max()) + 1).index_add_(0, tied, torch.ones_like(scales))
        scales = (torch.zeros_like(count).index_add_(0, tied, scales.log()) / count).exp()[tied]
    return (scales / (scales.max() * scales.min()).sqrt()).clamp(1e-3, 1e3)


def _error(weights: torch.Tensor, inputs: Inputs, grid: Grid, scales: torch.Tensor) -> float:
    rounded = grid.nearest(weights * scales).dequantized() / scales
    return float(inputs.error(weights - rounded).sum())


def clipped(weights: torch.Tensor, inputs: Inputs, grid: Grid) -> Grouped:
    """Rounded to nearest, each group's range shrunk by what leaves the least output error of that group's inputs."""
    parts = [_clipped(part, inputs, grid) for part in torch.split(weights, ROWS_AT_ONCE)]
    codes, scales, zeros = (torch.cat([getattr(p, name) for p in parts]) for name in ("codes", "scales", "zeros"))
    return Grouped(codes, scales, zeros, grid.bits, grid.group)


def _clipped(weights: torch.Tensor, inputs: Inputs, grid: Grid) -> Grouped:
    width = weights.shape[1]
    missing = -width % grid.group
    hessian = functional.pad(inputs.hessian, (0, missing, 0, missing))
    count = len(hessian) // grid.group
    blocks = split(split(hessian, 0, (count, -1)), 2, (count, -1))
    own = torch.stack([blocks[g, :, g] for g in range(count)])  # [G, group, group]
    grouped = grid.grouped(weights)
    best: list[torch.Tensor] = []
    least = torch.full(grouped.shape[:2], torch.inf)
    for shrink in SHRINKS:
        scales, zeros = grid.params(grouped, shrink)
        codes = grid.round(grouped, scales.unsqueeze(-1), zeros.unsqueeze(-1))
        off = (codes - zeros.unsqueeze(-1)) * scales.unsqueeze(-1) - grouped
        error = (torch.einsum("ngi,gij->ngj", off, own) * off).sum(dim=-1)
        better = error < least
        tried = [codes, scales, zeros]
        best = [
            torch.where(better.unsqueeze(-1) if t.dim() == 3 else better, t, b)
            for t, b in zip(tried, best or tried, strict=True)
        ]
        least = torch.where(better, error, least)
    return grid.made(best[0].flatten(1)[:, :width], best[1], best[2])
