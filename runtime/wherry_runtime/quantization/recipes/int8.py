"""int8 with a scale for each output, activations in int8 as they come."""

import torch

from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.layouts.compressed_tensors import INT8
from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.rounding import Grid
from wherry_runtime.quantization.solvers.inputs import Inputs


def round_outputs(weights: torch.Tensor, inputs: Inputs, settings: Settings) -> Grouped:
    """One scale for each output."""
    return Grid(8, weights.shape[1], symmetric=True).nearest(weights)


RECIPE = Recipe(
    name="int8",
    summary="Half the size of bfloat16, with next to no loss; no text is needed.",
    round=round_outputs,
    writer=lambda settings, shapes: INT8,
    offers=(Settings(),),
)
