"""Runs the measurements of `wherry eval`, and shows them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.quality.measure import Subject, check_same_tokens, compare, compare_answers
from wherry_runtime.quality.score import Summary
from wherry_runtime.tokenization.windows import windows

# Of each figure: its heading, and how it is written.
SHOWN: dict[str, tuple[str, str]] = {
    "perplexity": ("perplexity", "{:.3f}"),
    "change": ("change", "{:+.3%}"),
    "error": ("±", "{:.3%}"),
    "divergence": ("KL, nats", "{:.6f}"),
    "agreement": ("agreement", "{:.2%}"),
    "positions": ("tokens", "{:,}"),
    "weights": ("weights", "{:,.1f} MB"),
    "equal": ("equal answers", "{:.1%}"),
    "tokens": ("equal tokens", "{:.1%}"),
    "answers": ("answers", "{:,}"),
    "new_tokens": ("tokens each", "{:,}"),
}
# What a model is beside itself.
ALONE = ("change", "error", "divergence", "agreement")


class Runs:
    """What is measured on: the first windows of a text.

    Args:
        uri: makes one of what the user wrote.
    """

    def __init__(self, text: Path, count: int, length: int, uri: Callable[[str], str]) -> None:
        self._text = text
        self._count = count
        self._length = length
        self._uri = uri

    def perplexity(self, model: str, settings: dict[str, Any]) -> tuple[Summary, int]:
        """Of one model, and the bytes that its weights take."""
        subject = self._subject(model, settings)
        with self._progress("measuring") as done:
            return compare(subject.scorer, None, self._windows(subject), done).summary(), subject.weight_bytes

    def compare(
        self, model: str, reference: str, settings: dict[str, Any]
    ) -> tuple[tuple[Summary, int], tuple[Summary, int]]:
        """The model's and the reference's."""
        subject, theirs = self._both(model, reference, settings)
        chosen = self._windows(subject)
        with self._progress("measuring") as done:
            ours = compare(subject.scorer, theirs.scorer, chosen, done).summary()
        perplexity = ours.perplexity / (1 + ours.change)
        base = Summary(perplexity, 0.0, 0.0, 1.0, 0.0, ours.positions)
        return (ours, subject.weight_bytes), (base, theirs.weight_bytes)

    def answers(self, model: str, reference: str, new_tokens: int, settings: dict[str, Any]) -> dict[str, Any]:
        """Greedy answers of both."""
        subject, theirs = self._both(model, reference, settings)
        with self._progress("answering") as done:
            chosen = self._windows(subject)
            found = compare_answers(subject.scorer, theirs.scorer, chosen, new_tokens, done)
        result: dict[str, Any] = msgspec.to_builtins(found)
        return result

    def row(self, found: tuple[Summary, int]) -> dict[str, Any]:
        """The figures of one model, `weights` in bytes."""
        summary, weights = found
        row: dict[str, Any] = {**msgspec.to_builtins(summary), "weights": weights}
        alone = summary.divergence == 0 and summary.change == 0
        return {name: value for name, value in row.items() if not (alone and name in ALONE)}

    def _both(self, model: str, reference: str, settings: dict[str, Any]) -> tuple[Subject, Subject]:
        subject = self._subject(model, settings)
        plain = {**settings, "quantization": "none", "quantization_group": 0}
        theirs = self._subject(reference, plain)
        check_same_tokens(subject, theirs)
        return subject, theirs

    def _subject(self, model: str, settings: dict[str, Any]) -> Subject:
        return Subject(EngineConfig(model_name=model, model_uri=self._uri(model), **settings), self._length)

    def _windows(self, subject: Subject) -> Sequence[Sequence[int]]:
        return windows(self._text, subject.tokenizer, self._count, self._length)

    def _progress(self, text: str) -> "_Bar":
        return _Bar(text, self._count)


class _Bar:
    """A progress bar on standard error, gone when the work is done."""

    def __init__(self, text: str, total: int) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._task = self._progress.add_task(text, total=total)

    def __enter__(self) -> Callable[[], None]:
        self._progress.start()
        return lambda: self._progress.advance(self._task)

    def __exit__(self, *_: object) -> None:
        self._progress.stop()


def show(found: dict[str, dict[str, Any]]) -> None:
    """A table, a column for each figure that any of the rows has."""
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    names = [name for name in SHOWN if any(name in row for row in found.values())]
    table.add_column("")
    for name in names:
        table.add_column(SHOWN[name][0], justify="right")
    for label, row in found.items():
        values = [row[n] / 1e6 if n == "weights" else row[n] for n in names if n in row]
        texts = dict(zip([n for n in names if n in row], values, strict=True))
        table.add_row(label, *(SHOWN[n][1].format(texts[n]) if n in texts else "–" for n in names))
    Console().print(table)
