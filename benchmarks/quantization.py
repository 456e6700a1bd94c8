"""What each method of quantizing a checkpoint costs in quality: the tables of docs/quantization.md.

    python -m benchmarks.quantization [--model DIR] [--text FILE] [--calibration FILE] [--json FILE]

Every row is a checkpoint that was written as `wherry quantize` writes it, loaded into the engine (float32 where weights
are in no format of the engine's, KV cache in float32), and compared with the checkpoint it was made from, in float32,
on a text that neither training nor calibration saw. *Nearest* rounds to nearest against the largest magnitude of each
group, in the same layout as GPTQ: what others are measured against.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import Progress
from safetensors import safe_open

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.calibration.folds import folds
from wherry_runtime.calibration.pipeline import Job, quantize
from wherry_runtime.calibration.walk import Walk
from wherry_runtime.layers.linear import Linear
from wherry_runtime.quality.measure import Subject, compare
from wherry_runtime.quantization.layouts.gptq import WRITER
from wherry_runtime.quantization.recipes import known
from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.rounding import Grid
from wherry_runtime.quantization.solvers import awq, gptq
from wherry_runtime.quantization.solvers.inputs import Inputs
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "models" / "tiny"
DATA = ROOT / "benchmarks" / "data"
NEAREST = Recipe(
    name="nearest",
    summary="Rounded to nearest against the largest magnitude.",
    round=lambda weights, inputs, settings: settings.grid.nearest(weights),
    writer=lambda settings, shapes: WRITER,
    bits=(4, 3),
    groups=(128, 32, 64),
)
LAYOUTS = ((4, 128), (4, 32), (3, 32))


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
        return f"{self.recipe.name} {self.layout}".strip()


def every() -> list[Row]:
    recipes = known()
    plain = [Row(recipes[name], Settings()) for name in ("int8", "smoothquant", "fp8")]
    chosen = (NEAREST, recipes["int4"], recipes["awq"], recipes["gptq"])
    grouped = [Row(r, Settings(bits=bits, group=group)) for bits, group in LAYOUTS for r in chosen]
    last = [Row(recipes[name], Settings()) for name in ("nf4", "mxfp4", "prune24")]
    return [replace(row, settings=row.recipe.settled(row.settings)) for row in (*plain, *grouped, *last)]


def linear_bytes(directory: Path) -> int:
    """What the matrices of the layers take in the files, scales and all."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as shard:
            total += sum(shard.get_tensor(n).nbytes for n in shard.keys() if "_proj." in n)  # noqa: SIM118
    return total


def subject(directory: Path, args: argparse.Namespace) -> Subject:
    settings = {"dtype": "float32", "kv_cache_dtype": "float32", "threads": args.threads}
    return Subject(EngineConfig(model_name="m", model_uri=str(directory), **settings), args.length)


def measure(
    row: Row, reference: Subject, texts: dict[str, list[list[int]]], args: argparse.Namespace
) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "quantized")
        calibration = texts["calibration"] if row.recipe.calibrates else []
        quantize(Job(args.model, target, row.recipe, row.settings, calibration), lambda done, total: None)
        found = subject(target, args)
        score = compare(found.scorer, reference.scorer, texts["dev"], lambda: None)
        size = linear_bytes(target)
    float32 = 2 * linear_bytes(args.model)  # the checkpoint is bfloat16
    summary = msgspec.to_builtins(score.summary())
    return {**summary, "layout": row.layout, "file": size / float32, "weights": found.weight_bytes}


def table(rows: dict[str, dict[str, Any]]) -> str:
    """Markdown; divergence also as a share of rounding to nearest in the same layout."""
    head = ["method", "bits", "of float32", "perplexity", "change", "agreement", "KL", "of nearest's"]
    lines = [head, ["---"] * len(head)]
    for name, row in rows.items():
        nearest = rows.get(f"nearest {row['layout']}", {}).get("divergence")
        cells = [name, f"{32 * row['file']:.2f}", f"{row['file']:.1%}", f"{row['perplexity']:.3f}"]
        cells += [f"{row['change']:+.3%} ± {row['error']:.3%}", f"{row['agreement']:.2%}", f"{row['divergence']:.6f}"]
        lines.append([*cells, f"{row['divergence'] / nearest:.0%}" if nearest else "–"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def matrices(model: Path, texts: dict[str, list[list[int]]]) -> Iterator[tuple[Linear, Inputs, Inputs, Any]]:
    """Each matrix of the model with its inputs on the calibration text and on the other, and its fold if it has one."""
    length = len(texts["calibration"][0])
    walk = Walk(model, length)
    states = {
        "calibration": [walk.start(w) for w in texts["calibration"]],
        "dev": [walk.start(w[:length]) for w in texts["dev"]],
    }
    for layer in map(walk.layer, range(walk.num_layers)):
        found: dict[str, dict[Linear, Inputs]] = {name: {} for name in states}
        for name, rows in states.items():
            inputs = found[name]

            def watch(linear: Linear, x: torch.Tensor, inputs: dict[Linear, Inputs] = inputs) -> None:
                inputs.setdefault(linear, Inputs.empty(linear.num_inputs)).add(x)

            states[name] = [x for row in rows if (x := walk.run(layer, row, watch)) is not None]
        before = {fold.linear: fold for fold in folds(layer)}
        for linear, inputs in found["calibration"].items():
            yield linear, inputs, found["dev"][linear], before.get(linear)


def wins(model: Path, texts: dict[str, list[list[int]]], bits: int, group: int) -> tuple[int, int]:
    """In how many matrices, and of how many, AWQ leaves less error than GPTQ on inputs that neither saw."""
    grid, better, count = Grid(bits, group, symmetric=True), 0, 0
    for linear, inputs, unseen, fold in matrices(model, texts):
        if linear.weight is None:
            continue
        weights = linear.weight.float()
        solved = gptq.solve(weights, inputs, grid, act_order=True, damping=0.01).dequantized()
        scales = torch.ones(linear.num_inputs)
        if fold is not None:
            scales = awq.find_scales(weights, inputs, grid, fold.rows)
        scaled = awq.clipped(weights * scales, inputs.divided(scales), grid).dequantized() / scales
        errors = [float(unseen.error(weights - found).sum()) for found in (scaled, solved)]
        better, count = better + (errors[0] < errors[1]), count + 1
    return better, count


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=MODEL)
    parser.add_argument("--text", type=Path, default=DATA / "dev.txt")
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.txt")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="rows whose name begins so; `layers`: GPTQ beside AWQ")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures; rows that are in it already are kept")
    args = parser.parse_args(argv)
    tokenizer = Tokenizer(args.model)
    texts = {
        "dev": windows(args.text, tokenizer, args.windows, args.length),
        "calibration": windows(args.calibration, tokenizer, args.calibration_windows, 512),
    }
    known_rows = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    found: dict[str, Any] = known_rows.get("rows", {})
    reference = subject(args.model, args)
    chosen = [row for row in every() if not args.only or row.name.startswith(tuple(args.only))]
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for row in progress.track(chosen, description="quantizing"):
            found[row.name] = measure(row, reference, texts, args)
    beats: dict[str, Any] = known_rows.get("awq_beats_gptq", {})
    if not args.only or "layers" in args.only:
        with torch.inference_mode():
            for count in (2, args.calibration_windows):
                few = {**texts, "calibration": texts["calibration"][:count]}
                for bits, group in (LAYOUTS[0], LAYOUTS[2]):
                    beats[f"int{bits} g{group}, {count} windows"] = wins(args.model, few, bits, group)
    found = {row.name: found[row.name] for row in every() if row.name in found}
    console = Console(width=200)
    console.print(table(found), markup=False, soft_wrap=True)
    for name, (better, of) in beats.items():
        console.print(f"AWQ leaves less error than GPTQ in {better} of {of} matrices ({name})")
    if args.json:
        args.json.write_text(json.dumps({"rows": found, "awq_beats_gptq": beats}, indent=1) + "\n")


if __name__ == "__main__":
    main()
