"""Magnitude pruning (Han et al., 2015, https://arxiv.org/abs/1506.02626): the smallest weights become zero."""

import torch

from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.recipes.prune import Sparse
from wherry_runtime.quantization.solvers.inputs import Inputs


def _round(weights: torch.Tensor, inputs: Inputs, settings: Settings) -> Sparse:
    flat = weights.flatten()
    kept = flat.abs().topk(flat.numel() - round(settings.sparsity * flat.numel()), sorted=False).indices
    return Sparse(torch.zeros_like(flat).index_copy_(0, kept, flat[kept]).view_as(weights))


RECIPE = Recipe(
    name="prune",
    summary="The smallest weights of each matrix zero, in a plain checkpoint; no text is needed.",
    round=_round,
    writer=lambda settings, shapes: None,
    sparsity=0.5,
)
