"""AWQ: inputs that are large get finer steps, then ranges are clipped (https://arxiv.org/abs/2306.00978)."""

import torch

from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.layouts import awq, gptq
from wherry_runtime.quantization.layouts.base import Writer
from wherry_runtime.quantization.recipes.base import Recipe, Settings, Shapes
from wherry_runtime.quantization.solvers.awq import clipped, find_scales
from wherry_runtime.quantization.solvers.inputs import Inputs


def _scales(weights: torch.Tensor, inputs: Inputs, settings: Settings, tied: torch.Tensor | None) -> torch.Tensor:
    return find_scales(weights, inputs, settings.grid, tied)


def _round(weights: torch.Tensor, inputs: Inputs, settings: Settings) -> Grouped:
    return clipped(weights, inputs, settings.grid)


def _writer(settings: Settings, shapes: Shapes) -> Writer:
    """AWQ's own layout has 4 bits and whole groups; GPTQ's holds the rest just as well."""
    own = settings.bits == awq.BITS and all(awq.fits(*shape, settings.group) for shape in shapes)
    return awq.WRITER if own else gptq.WRITER


RECIPE = Recipe(
    name="awq",
    summary="Weights of large inputs get finer steps. It needs less text than GPTQ.",
    round=_round,
    writer=_writer,
    bits=(4, 3),
    groups=(128, 32, 64),
    calibrates=True,
    zero_points=True,
    offers=(Settings(bits=4, group=32),),
    scales=_scales,
)
