"""NF4: steps where a normal distribution has its weights (https://arxiv.org/abs/2305.14314)."""

from wherry_runtime.quantization.layouts.bitsandbytes import WRITER
from wherry_runtime.quantization.nf4 import quantize_nf4
from wherry_runtime.quantization.recipes.base import Recipe

RECIPE = Recipe(
    name="nf4",
    summary="4 bits for fine-tuning with bitsandbytes; no text is needed.",
    round=lambda weights, inputs, settings: quantize_nf4(weights),
    writer=lambda settings, shapes: WRITER,
)
