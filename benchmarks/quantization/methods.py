"""What each method costs: a row is a checkpoint that was written as `wherry quantize` writes it, loaded into the engine
and compared with the checkpoint that it was made from, in float32, on a text that neither training nor calibration saw.

*Nearest* rounds to nearest against the largest magnitude of each group, in the same layout as GPTQ: what others are
measured against.
"""

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.quantization import llamacpp
from benchmarks.quantization.subjects import linear_bytes, subject, table

from wherry_runtime.calibration.pipeline import Job, quantize
from wherry_runtime.calibration.sensitivity import Sensitivity, mixed, sensitivities
from wherry_runtime.quality.measure import compare
from wherry_runtime.quantization.layouts.gptq import WRITER
from wherry_runtime.quantization.recipes import known
from wherry_runtime.quantization.recipes.base import Recipe, Settings

NEAREST = Recipe(
    name="nearest",
    summary="Rounded to nearest against the largest magnitude.",
    round=lambda weights, inputs, settings: settings.grid.nearest(weights),
    writer=lambda settings, shapes: WRITER,
    bits=(4, 3),
    groups=(128, 32, 64),
)
LAYOUTS = ((4, 128), (4, 32), (3, 32))
MIXED = (4.5, 4.125, 3.5, 3.0)
HEAD = ["method", "bits", "of float32", "perplexity", "change", "agreement", "KL", "of nearest's"]


@dataclass(frozen=True)
class Row:
    """A method with its settings."""

    recipe: Recipe
    settings: Settings

    @property
    def layout(self) -> str:
        return f"int{self.settings.bits} g{self.settings.group}" if self.settings.bits else ""

    @property
    def name(self) -> str:
        if self.settings.bits_per_weight:
            return f"{self.recipe.name} mixed {self.settings.bits_per_weight:g}"
        return f"{self.recipe.name} {self.layout}".strip()


def every() -> list[Row]:
    recipes = known()
    plain = [Row(recipes[name], Settings()) for name in ("int8", "smoothquant", "llm-int8", "fp8")]
    chosen = (NEAREST, recipes["int4"], recipes["awq"], recipes["gptq"], recipes["awq-gptq"])
    grouped = [Row(r, Settings(bits=bits, group=group)) for bits, group in LAYOUTS for r in chosen]
    uneven = [Row(recipes["gptq"], Settings(bits_per_weight=bits)) for bits in MIXED]
    last = [Row(recipes[name], Settings()) for name in ("nf4", "mxfp4", "prune24", "prune")]
    return [replace(row, settings=row.recipe.settled(row.settings)) for row in (*plain, *grouped, *uneven, *last)]


class Measurer:
    """Measures rows of one model.

    Args:
        windows: of the text to measure on, and to calibrate with.
    """

    def __init__(self, model: Path, windows: list[list[int]], calibration: list[list[int]], threads: int) -> None:
        self._model, self._windows, self._calibration, self._threads = model, windows, calibration, threads
        self._length = len(windows[0])
        self._reference = subject(model, self._length, threads)
        self._sensitivities: list[Sensitivity] | None = None

    def names(self) -> list[str]:
        """Of all rows."""
        return [*(row.name for row in every()), *llamacpp.names()]

    def measure(self, name: str) -> dict[str, Any]:
        """A row of the table."""
        if name in llamacpp.names():
            return llamacpp.measure(name, self._model, self._reference, self._windows, self._length)
        row = next(row for row in every() if row.name == name)
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder, "quantized")
            calibration = self._calibration if row.recipe.calibrates else []
            mix = self._mix(row, target) if row.settings.bits_per_weight else {}
            quantize(Job(self._model, target, row.recipe, row.settings, calibration, mix), lambda done, total: None)
            found = subject(target, self._length, self._threads)
            score = compare(found.scorer, self._reference.scorer, self._windows, lambda: None)
            size = linear_bytes(target)
        float32 = 2 * linear_bytes(self._model)  # the checkpoint is bfloat16
        return {**msgspec.to_builtins(score.summary()), "layout": row.layout, "file": size / float32}

    def _mix(self, row: Row, target: Path) -> dict[str, Settings]:
        if self._sensitivities is None:
            given = (self._model, target, row.recipe, row.settings, self._calibration)
            self._sensitivities = sensitivities(*given, lambda done, total: None)
        return mixed(self._sensitivities, row.recipe, row.settings)


def report(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown; divergence also as a share of rounding to nearest in the same layout."""
    lines = []
    for name, row in rows.items():
        nearest = rows.get(f"nearest {row['layout']}", {}).get("divergence")
        cells = [name, f"{32 * row['file']:.2f}", f"{row['file']:.1%}", f"{row['perplexity']:.3f}"]
        cells += [f"{row['change']:+.3%} ± {row['error']:.3%}", f"{row['agreement']:.2%}", f"{row['divergence']:.6f}"]
        lines.append([*cells, f"{row['divergence'] / nearest:.0%}" if nearest else "–"])
    return table(HEAD, lines)
