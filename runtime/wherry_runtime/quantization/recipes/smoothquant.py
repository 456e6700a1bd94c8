"""SmoothQuant: outliers of activations go into the weights, then int8 (https://arxiv.org/abs/2211.10438)."""

import torch

from wherry_runtime.quantization.layouts.compressed_tensors import INT8
from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.recipes.int8 import round_outputs
from wherry_runtime.quantization.solvers.awq import normalized
from wherry_runtime.quantization.solvers.inputs import Inputs


def _scales(weights: torch.Tensor, inputs: Inputs, settings: Settings, tied: torch.Tensor | None) -> torch.Tensor:
    """max |x|^a / max |w|^(1 - a): equation 4. Weights are multiplied with it."""
    inputs_top, weights_top = inputs.largest.clamp(min=1e-5), weights.abs().amax(dim=0).clamp(min=1e-5)
    return normalized(inputs_top**settings.smoothing / weights_top ** (1 - settings.smoothing), tied)


RECIPE = Recipe(
    name="smoothquant",
    summary="int8 for models whose activations have outliers.",
    round=round_outputs,
    writer=lambda settings, shapes: INT8,
    calibrates=True,
    offers=(Settings(),),
    scales=_scales,
)
