"""Ternary weights, for models that were trained to have them: BitNet b1.58 (https://arxiv.org/abs/2402.17764)."""

from wherry_runtime.quantization.layouts.ternary import WRITER
from wherry_runtime.quantization.recipes.base import Recipe
from wherry_runtime.quantization.ternary import quantize_ternary

RECIPE = Recipe(
    name="ternary",
    summary="-1, 0 and 1 in 1.6 bits, for models that were trained so; no text is needed.",
    round=lambda weights, inputs, settings: quantize_ternary(weights),
    writer=lambda settings, shapes: WRITER,
)
