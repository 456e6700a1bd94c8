"""AWQ's scales, which take outliers out of the activations, and GPTQ's rounding after them (section 5.3 of AWQ's paper,
https://arxiv.org/abs/2306.00978, combines the two)."""

from dataclasses import replace

from wherry_runtime.quantization.recipes import awq, gptq
from wherry_runtime.quantization.recipes.base import Settings

RECIPE = replace(
    gptq.RECIPE,
    name="awq-gptq",
    summary="As gptq, once AWQ's scales took outliers out of the activations. The best where there are any.",
    scales=awq.RECIPE.scales,
    offers=(Settings(bits=4, group=128),),
    mixes=(),
)
