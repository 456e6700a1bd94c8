"""AWQ beside GPTQ, with more and less text to calibrate with, of the kind that is measured on and of others.

GPTQ lets columns make up for one another as the calibration text needs it; AWQ only scales and clips. So the question
is what each keeps of it on another text (section 5 of AWQ's paper, https://arxiv.org/abs/2306.00978): here the held-out
documentation, whatever was calibrated with. *Matrices* counts in how many of the model AWQ leaves less squared output
error there than GPTQ, each matrix by itself, with the inputs that the model itself gives it.
"""

import random
import tempfile
from collections.abc import Callable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import torch
from benchmarks.quantization.methods import Measurer
from benchmarks.quantization.outliers import with_outliers
from benchmarks.quantization.subjects import DATA, MODELS, ROOT, table

from wherry_runtime.calibration.folds import folds
from wherry_runtime.calibration.walk import Walk
from wherry_runtime.layers.linear import Linear
from wherry_runtime.quantization.rounding import Grid
from wherry_runtime.quantization.solvers import awq, gptq
from wherry_runtime.quantization.solvers.inputs import Inputs
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

LENGTH = 512
MEASURED = 8  # windows of the text that is measured on
COUNTS = (1, 16)
LAYOUTS = ((4, 128), (3, 32))
SUBJECTS = (("draft", 1), ("draft", 64), ("tiny", 1))  # models, and their outliers: see outliers.py
KINDS = ("documentation", "code", "Chinese characters", "random tokens")


def calibration(kind: str, tokenizer: Tokenizer) -> list[list[int]]:
    """`max(COUNTS)` windows of one kind of text."""
    count = max(COUNTS)
    chosen = random.Random(0)
    if kind == "documentation":
        return windows(DATA / "calibration.txt", tokenizer, count, LENGTH)
    if kind == "random tokens":
        return [[chosen.randrange(tokenizer.vocab_size) for _ in range(LENGTH)] for _ in range(count)]
    if kind == "code":
        text = "".join(p.read_text() for p in sorted((ROOT / "runtime" / "wherry_runtime" / "engine").glob("*.py")))
    else:
        text = "".join(chr(chosen.randrange(0x4E00, 0x9FA5)) for _ in range(count * LENGTH))
    ids = tokenizer.encode(text, special_tokens=False)
    return [ids[i * LENGTH : (i + 1) * LENGTH] for i in range(count)]


def matrices(model: Path, texts: list[list[list[int]]]) -> Iterator[tuple[Linear, list[Inputs], Any]]:
    """Each matrix of the model with its inputs on each text, and its fold if it has one."""
    walk = Walk(model, LENGTH)
    states = [[walk.start(window) for window in text] for text in texts]
    for layer in map(walk.layer, range(walk.num_layers)):
        found: dict[Linear, list[Inputs]] = {}
        for place, windows_ in enumerate(states):

            def watch(linear: Linear, x: torch.Tensor, place: int = place) -> None:
                if linear not in found:  # noqa: B023 - called before the next layer
                    found[linear] = [Inputs.empty(linear.num_inputs) for _ in texts]  # noqa: B023
                found[linear][place].add(x)  # noqa: B023

            states[place] = [walk.through(layer, x, watch) for x in windows_]
        before = {fold.linear: fold for fold in folds(layer)}
        for linear, inputs in found.items():
            yield linear, inputs, before.get(linear)


def wins(model: Path, text: list[list[int]], other: list[list[int]], grid: Grid) -> tuple[int, int]:
    """In how many matrices, and of how many, AWQ leaves less error than GPTQ on the other text."""
    better = count = 0
    for linear, (inputs, unseen), fold in matrices(model, [text, other]):
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


def run(found: dict[str, Any], done: Callable[[], None]) -> None:
    """Adds each case to `found`: the divergence of both, and matrices. What is there already is kept."""
    for name, factor in SUBJECTS:
        with tempfile.TemporaryDirectory() as folder:
            model, label, kinds = MODELS / name, name, KINDS
            if factor > 1:
                model, label, kinds = Path(folder, "model"), f"{name}, outliers × {factor}", KINDS[:1]
                with_outliers(MODELS / name, model, factor)
            for kind, count, (bits, group) in product(kinds, COUNTS, LAYOUTS):
                if (case := f"{label}; {kind}; {count}; int{bits} g{group}") not in found:
                    found[case] = measured(model, kind, count, Grid(bits, group, symmetric=True))
                    done()


def measured(model: Path, kind: str, count: int, grid: Grid) -> tuple[float, float, int, int]:
    """The divergence of AWQ and of GPTQ, and in how many matrices, and of how many, AWQ leaves less error."""
    tokenizer = Tokenizer(model)
    other = windows(DATA / "dev.txt", tokenizer, MEASURED, LENGTH)
    text = calibration(kind, tokenizer)[:count]
    measurer = Measurer(model, other, text, 1)
    scaled, solved = (measurer.measure(f"{method} int{grid.bits} g{grid.group}") for method in ("awq", "gptq"))
    with torch.inference_mode():
        return scaled["divergence"], solved["divergence"], *wins(model, text, other, grid)


def report(found: dict[str, Any]) -> str:
    """A line for each model, kind of text and number of windows, and how often AWQ is the better one."""
    lines: dict[str, list[str]] = {}
    models = matrices_ = count = 0
    for case, (scaled, solved, better, of) in found.items():
        name, kind, windows_, _ = case.split("; ")
        cells = [f"{scaled:.5f}", f"{solved:.5f}", f"{better} of {of}"]
        if scaled < solved:
            cells[0] = f"**{cells[0]}**"
        lines.setdefault(f"{name}; {kind}; {windows_}", [name, kind, windows_]).extend(cells)
        models, matrices_, count = models + (scaled < solved), matrices_ + better, count + of
    head = ["model", "calibrated with", "windows"]
    for bits, group in LAYOUTS:
        head += [f"int{bits} g{group}: AWQ", "GPTQ", "matrices"]
    told = f"AWQ is better in {models} of {len(found)} cases ({models / len(found):.0%}), and in {matrices_} of {count}"
    return f"{table(head, list(lines.values()))}\n\n{told} matrices ({matrices_ / count:.0%})"
