"""Whether `--method auto` takes the smallest candidate that keeps the limit.

Every candidate is quantized once for each model, and measured three times: on the windows of the calibration text that
`auto` holds out, and on each half of the other text. With `--measure-on`, `auto` chooses by one half; without, by what
it holds out. The true best is the smallest file among the candidates that keep the limit on the half that `auto` has
not seen. A case is a model, a limit and a half.
"""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.quantization.subjects import DATA, MODELS, linear_bytes, table

from wherry_runtime.calibration.auto import Loss, Trials, candidates, first_within
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

LIMITS = [step * decade for decade in (1e-4, 1e-3, 1e-2) for step in (1, 2, 3, 5, 7)]
WINDOWS, HALF, LENGTH = 64, 32, 512
SAMPLES = ("draft", "tiny")
NOTHING = "nothing"


class Tried(NamedTuple):
    """A candidate: bytes of its matrices; its mean divergence and the standard error of that, on the windows that
    `auto` holds out and on each half of the other text."""

    name: str
    size: int
    held_out: tuple[float, float]
    halves: tuple[tuple[float, float], tuple[float, float]]


def true_best(tried: list[Tried], half: int, limit: float) -> str:
    """The smallest that keeps the limit; of equally large ones the one that loses least."""
    good = [t for t in tried if t.halves[half][0] <= limit]
    return min(good, key=lambda t: (t.size, t.halves[half][0])).name if good else NOTHING


def chosen(measured: dict[str, tuple[float, float]], limit: float) -> str:
    """What `auto` takes, by its own measurements."""
    try:
        return str(first_within(limit, lambda candidate: Loss(*measured[str(candidate)]))[0])
    except ModelError:
        return NOTHING


def tried(model: Path, folder: Path) -> Iterator[Tried]:
    """All candidates."""
    tokenizer = Tokenizer(model)
    trials = Trials(model, windows(DATA / "calibration.txt", tokenizer, WINDOWS, LENGTH))
    other = windows(DATA / "dev.txt", tokenizer, 2 * HALF, LENGTH)
    for number, candidate in enumerate(candidates()):
        target = folder / str(number)
        held_out = trials.loss(candidate, target, lambda done, total: None)
        first, second = (trials.measured(target, part) for part in (other[:HALF], other[HALF:]))
        halves = ((first.mean, first.error), (second.mean, second.error))
        yield Tried(str(candidate), linear_bytes(target), (held_out.mean, held_out.error), halves)


def run(found: dict[str, Any], done: Callable[[], None]) -> None:
    """Adds to `found`: model → what was tried. What is there already is kept."""
    for name in SAMPLES:
        if name not in found:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = list(tried(MODELS / name, Path(folder)))
            done()


def report(found: dict[str, Any]) -> str:
    """The candidates, the cases where `auto` is wrong, and the share in which it is right."""
    every = {name: [Tried(*row) for row in rows] for name, rows in found.items()}
    lines = []
    for name, rows in every.items():
        for t in rows:
            parts = (t.held_out, *t.halves)
            lines.append([name, t.name, f"{t.size:,}", *(f"{mean:.6f} ± {error:.6f}" for mean, error in parts)])
    parts_ = [table(["model", "candidate", "bytes", "held out", "first half", "second half"], lines)]
    for how, measured in (
        ("--measure-on", lambda t, half: t.halves[1 - half]),
        ("the calibration text alone", lambda t, half: t.held_out),
    ):
        cases = [
            (name, limit, chosen({t.name: measured(t, half) for t in rows}, limit), true_best(rows, half, limit))
            for name, rows in every.items()
            for half in (0, 1)
            for limit in LIMITS
        ]
        wrong = [[name, f"{limit:g}", own, best] for name, limit, own, best in cases if own != best]
        right = len(cases) - len(wrong)
        told = f"\nWith {how}, auto is right in {right} of {len(cases)} cases ({right / len(cases):.0%})"
        if wrong:
            parts_ += [f"{told}; not in\n", table(["model", "limit", "auto", "true best"], wrong)]
        else:
            parts_.append(f"{told}.")
    return "\n".join(parts_)
