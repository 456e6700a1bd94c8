"""GPTQ (Frantar et al., 2022, https://arxiv.org/abs/2210.17323): columns are rounded one by one, and the error of each
is made up for by those that are still to come."""

import torch

from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.rounding import Grid
from wherry_runtime.quantization.solvers.inputs import Inputs

BLOCK = 128  # columns that are finished before the rest of the matrix is touched


def solve(weights: torch.Tensor, inputs: Inputs, grid: Grid, *, act_order: bool, damping: float) -> Grouped:
    """Codes whose output error is, for every output, no larger than that of rounding to nearest.

    With `act_order` the columns with the largest activations come first; groups stay as they lie in the matrix, so that
    a kernel need not look up each input's group.

    Args:
        weights: [N, K] float32.
        damping: share of the mean diagonal that is added to the Hessian's.
    """
    nearest = grid.nearest(weights)
    diagonal = inputs.hessian.diagonal()
    scales, zeros = grid.fit(grid.grouped(weights), grid.grouped(diagonal[None])[0])
    order = torch.argsort(diagonal, descending=True, stable=True) if act_order else torch.arange(len(diagonal))
    factor = _factor(inputs.hessian, order, damping)
    codes = torch.empty_like(weights)
    codes[:, order] = _columns(weights[:, order], factor, grid, scales, zeros, order // grid.group)
    solved = grid.made(codes, scales, zeros)
    fitted = grid.made(_plain(weights, grid, scales, zeros), scales, zeros)
    return best_rows(weights, inputs, [solved, fitted, nearest])


def best_rows(weights: torch.Tensor, inputs: Inputs, found: list[Grouped]) -> Grouped:
    """Of each output the candidate with the least error; the earlier one where they are equal."""
    errors = torch.stack([inputs.error(weights - one.dequantized()) for one in found])
    best = errors.nan_to_num(torch.inf).argmin(dim=0)
    row = torch.arange(len(best))

    def pick(parts: list[torch.Tensor]) -> torch.Tensor:
        return torch.stack(parts)[best, row]

    codes, scales, zeros = ([getattr(one, name) for one in found] for name in ("codes", "scales", "zeros"))
    return Grouped(pick(codes), pick(scales), pick(zeros), found[0].bits, found[0].group)


def _plain(weights: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor) -> torch.Tensor:
    codes = grid.round(grid.grouped(weights), scales.unsqueeze(-1), zeros.unsqueeze(-1))
    return codes.flatten(1)[:, : weights.shape[1]]


def _factor(hessian: torch.Tensor, order: torch.Tensor, damping: float) -> torch.Tensor:
    """[K, K] upper triangular U with UᵀU = H⁻¹, columns in `order`. Damped more where rounding left H not positive.

    H turned about its other diagonal is L Lᵀ, so H itself is R Rᵀ with R upper triangular, and U is R⁻¹: half the work
    of inverting H and factoring that. All of it in place: with 8,192 inputs half a gigabyte is in each float64 copy.
    """
    turned = order.flip(0)
    mean = float(hessian.diagonal().double().mean()) or 1.0
    for _ in range(10):
        lower = hessian[turned][:, turned].double().mT  # by columns, as LAPACK has them; it is symmetric
        lower.diagonal().add_(damping * mean)
        failed = torch.linalg.cholesky_ex(lower, out=(lower, torch.empty((), dtype=torch.int32))).info
        if not failed:
            break
        damping *= 10
    lower = lower.float()
    upper = lower.flip(0, 1)
    del lower
    inverse = torch.eye(len(order))
    torch.linalg.solve_triangular(upper, inverse, upper=True, out=inverse)
    return inverse


def _columns(
    weights: torch.Tensor, factor: torch.Tensor, grid: Grid, scales: torch.Tensor, zeros: torch.Tensor, of: torch.Tensor
) -> torch.Tensor:
    """[N, K] codes as float32; column k has the scale of group of[k]."""
    left = weights.clone()
    codes = torch.empty_like(weights)
    for start in range(0, weights.shape[1], BLOCK):
        stop = min(start + BLOCK, weights.shape[1])
        errors = left.new_empty(len(left), stop - start)
        for k in range(start, stop):
            scale, zero = scales[:, of[k]], zeros[:, of[k]]
            codes[:, k] = grid.round(left[:, k], scale, zero)
            errors[:, k - start] = (left[:, k] - (codes[:, k] - zero) * scale) / factor[k, k]
            left[:, k:stop] -= torch.outer(errors[:, k - start], factor[k, k:stop])
        left[:, stop:] -= errors @ factor[start:stop, stop:]
    return codes
