"""Sparsity 2:4 by Wanda's measure, |w| · ‖x‖ (Sun et al., 2023, https://arxiv.org/abs/2306.11695)."""

from dataclasses import dataclass

import torch

from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.solvers.inputs import Inputs
from wherry_runtime.quantization.tensors import split


@dataclass(frozen=True, slots=True)
class Sparse:
    """weights [N, K] float32, some of them zero."""

    weights: torch.Tensor

    def dequantized(self) -> torch.Tensor:
        """The weights."""
        return self.weights


def _round(weights: torch.Tensor, inputs: Inputs, settings: Settings) -> Sparse:
    weight = weights.abs() * inputs.hessian.diagonal().sqrt()
    fours = split(torch.nn.functional.pad(weight, (0, -weight.shape[1] % 4)), 1, (-1, 4))
    kept = torch.zeros_like(fours, dtype=torch.bool).scatter_(-1, fours.topk(2, dim=-1).indices, True)
    return Sparse(weights * kept.flatten(1)[:, : weights.shape[1]])


RECIPE = Recipe(
    name="prune24",
    summary="Half of the weights zero, two of every four, in a plain checkpoint.",
    round=_round,
    writer=lambda settings, shapes: None,
    calibrates=True,
)
