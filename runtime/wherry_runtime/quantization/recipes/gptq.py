"""GPTQ: the error of each column is made up for by those that follow (https://arxiv.org/abs/2210.17323)."""

import torch

from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.layouts.base import Writer
from wherry_runtime.quantization.layouts.compressed_tensors import PACKED
from wherry_runtime.quantization.layouts.gptq import WRITER
from wherry_runtime.quantization.recipes.base import Recipe, Settings, Shapes
from wherry_runtime.quantization.solvers.gptq import solve
from wherry_runtime.quantization.solvers.inputs import Inputs


def _round(weights: torch.Tensor, inputs: Inputs, settings: Settings) -> Grouped:
    return solve(weights, inputs, settings.grid, act_order=settings.act_order, damping=settings.damping)


def _writer(settings: Settings, shapes: Shapes) -> Writer:
    """GPTQ's own layout has one number of bits for all matrices, and others read it with whole words of inputs only."""
    odd = any(inputs * settings.bits % 32 for _, inputs in shapes)
    return PACKED if settings.bits_per_weight or (odd and settings.symmetric) else WRITER


RECIPE = Recipe(
    name="gptq",
    summary="Columns make up for the rounding of those before them. The best in 4 and 3 bits.",
    round=_round,
    writer=_writer,
    bits=(4, 3, 2, 8),
    groups=(128, 32, 64),
    calibrates=True,
    zero_points=True,
    offers=tuple(Settings(bits_per_weight=bits) for bits in (2.75, 3.5, 4.125, 5.25)),
    mixes=(
        *(Settings(bits=3, group=128), Settings(bits=2, group=32), Settings(bits=3, group=32)),
        *(Settings(bits=4, group=128), Settings(bits=4, group=32), Settings(bits=8, group=128)),
    ),
)
