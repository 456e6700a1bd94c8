"""LLM.int8: as int8, but the largest activations are not rounded with the others (https://arxiv.org/abs/2208.07339)."""

from wherry_runtime.quantization.layouts.bitsandbytes import INT8, THRESHOLD
from wherry_runtime.quantization.recipes.base import Recipe
from wherry_runtime.quantization.recipes.int8 import round_outputs

RECIPE = Recipe(
    name="llm-int8",
    summary="int8 for models whose activations have outliers, which are multiplied apart; no text is needed.",
    round=round_outputs,
    writer=lambda settings, shapes: INT8,
    outliers=THRESHOLD,
)
