"""FP8 E4M3 with a scale for each output, activations in FP8 as they come where hardware has it."""

from wherry_runtime.quantization.fp8 import quantize_rows
from wherry_runtime.quantization.layouts.compressed_tensors import FP8
from wherry_runtime.quantization.recipes.base import Recipe

RECIPE = Recipe(
    name="fp8",
    summary="8 bits for GPUs that multiply them; no text is needed.",
    round=lambda weights, inputs, settings: quantize_rows(weights),
    writer=lambda settings, shapes: FP8,
)
