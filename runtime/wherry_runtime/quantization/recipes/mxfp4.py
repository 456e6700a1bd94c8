"""MXFP4: FP4 E2M1 in groups of 32 with a power of two for a scale (OCP Microscaling specification)."""

from wherry_runtime.quantization.fp4 import quantize_mxfp4
from wherry_runtime.quantization.layouts.compressed_tensors import MX
from wherry_runtime.quantization.recipes.base import Recipe

RECIPE = Recipe(
    name="mxfp4",
    summary="4 bits for GPUs that multiply them; no text is needed.",
    round=lambda weights, inputs, settings: quantize_mxfp4(weights),
    writer=lambda settings, shapes: MX,
)
