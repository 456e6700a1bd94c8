"""int4 in groups, rounded to nearest against the scale that leaves the least squared error."""

from wherry_runtime.quantization.layouts.compressed_tensors import PACKED
from wherry_runtime.quantization.recipes.base import Recipe

RECIPE = Recipe(
    name="int4",
    summary="Rounded to nearest in groups; no text is needed.",
    round=lambda weights, inputs, settings: settings.grid.nearest(weights, search=True),
    writer=lambda settings, shapes: PACKED,
    bits=(4, 3, 2),
    groups=(32, 64, 128),
)
