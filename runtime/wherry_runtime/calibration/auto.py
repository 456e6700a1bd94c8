"""Finds the smallest way of quantizing a model that keeps its quality, by trying on the model itself."""

import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from statistics import fmean, stdev

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.calibration.pipeline import Job, Report, quantize
from wherry_runtime.calibration.sensitivity import Sensitivity, mixed, sensitivities
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quality.measure import Subject, compare
from wherry_runtime.quantization.recipes import known
from wherry_runtime.quantization.recipes.base import Recipe, Settings

HELD_OUT = 8  # one window of so many is for measuring


@dataclass(frozen=True)
class Loss:
    """Divergence from the source in nats per token, as far as some windows tell it."""

    mean: float
    error: float  # standard error of the mean, from how much windows differ

    @classmethod
    def of(cls, windows: Sequence[float]) -> "Loss":
        """From the divergence in each window."""
        spread = stdev(windows) if len(windows) > 1 else 0.0
        return cls(fmean(windows), spread / math.sqrt(len(windows)))

    def within(self, limit: float) -> bool:
        """Whether other text is likely to keep the limit, too: with the standard error on top."""
        return self.mean + self.error <= limit

    def __str__(self) -> str:
        return f"{self.mean:.4f} ± {self.error:.4f}"


@dataclass(frozen=True)
class Candidate:
    """A method with settings."""

    recipe: Recipe
    settings: Settings

    @property
    def bits(self) -> float:
        """Of a weight, scales and zero points included."""
        if self.settings.bits_per_weight:
            return self.settings.bits_per_weight
        bits = self.settings.bits or 8
        return bits + ((16 + bits) / self.settings.group if self.settings.group else 0)

    def __str__(self) -> str:
        chosen = self.settings
        if chosen.bits_per_weight:
            return f"{self.recipe.name} mixed, {chosen.bits_per_weight:g} bits"
        return f"{self.recipe.name} {chosen.bits} bits, groups of {chosen.group}" if chosen.bits else self.recipe.name


def candidates() -> list[Candidate]:
    """What the methods offer, the smallest first."""
    offered = [Candidate(recipe, recipe.settled(s)) for recipe in known().values() for s in recipe.offers]
    return sorted(offered, key=lambda candidate: candidate.bits)


class Trials:
    """Quantizes a model in several ways, and measures what each costs on windows that were not calibrated with.

    Args:
        windows: token ids to calibrate with.
        text: token ids to measure on; without, every eighth of `windows`, which is then not calibrated with.

    Raises:
        ModelError: too_little_text, or why the model cannot be loaded.
    """

    def __init__(self, source: Path, windows: list[list[int]], text: list[list[int]] | None = None) -> None:
        self._source = source
        self._unseen = text or windows[::HELD_OUT]
        self._seen = windows if text else [w for i, w in enumerate(windows) if i % HELD_OUT]
        if not self._seen:
            raise ModelError(
                "too_little_text", "auto needs two windows at least: one to calibrate with, one to measure on"
            )
        self._reference = _subject(source, len(self._unseen[0]))
        self._sensitivities: dict[str, list[Sensitivity]] = {}

    def loss(self, candidate: Candidate, target: Path, report: Report) -> Loss:
        """Writes the candidate's checkpoint to `target`; what it loses."""
        recipe, settings = candidate.recipe, candidate.settings
        calibration = self._seen if recipe.calibrates else []
        mix = self._mix(recipe, settings, target, report) if settings.bits_per_weight else {}
        quantize(Job(self._source, target, recipe, settings, calibration, mix), report)
        return self.measured(target, self._unseen)

    def measured(self, target: Path, windows: list[list[int]]) -> Loss:
        """What a checkpoint loses on windows that are no longer than those to calibrate with."""
        subject = _subject(target, len(self._unseen[0]))
        scores = (compare(subject.scorer, self._reference.scorer, [w], lambda: None) for w in windows)
        return Loss.of([score.summary().divergence for score in scores])

    def _mix(self, recipe: Recipe, settings: Settings, target: Path, report: Report) -> dict[str, Settings]:
        """Sensitivities do not depend on how many bits there are, so they are measured once."""
        if recipe.name not in self._sensitivities:
            self._sensitivities[recipe.name] = sensitivities(self._source, target, recipe, settings, self._seen, report)
        return mixed(self._sensitivities[recipe.name], recipe, settings)


def first_within(limit: float, loss: Callable[[Candidate], Loss]) -> tuple[Candidate, Loss]:
    """The smallest candidate that keeps `limit`, and what it loses; larger ones are not looked at.

    Of equally large ones it is the one that loses least.

    Raises:
        ModelError: none_good_enough with what was measured.
    """
    measured: list[str] = []
    for _, equal in groupby(candidates(), key=lambda candidate: candidate.bits):
        found: list[tuple[Candidate, Loss]] = []
        for candidate in equal:
            try:
                lost = loss(candidate)
            except ModelError as error:
                if error.code != "too_few_bits":
                    raise
                continue
            if lost.within(limit):
                found.append((candidate, lost))
            measured.append(f"{candidate}: {lost}")
        if found:
            return min(found, key=lambda one: one[1].mean)
    raise ModelError("none_good_enough", f"nothing keeps the divergence within {limit}: {'; '.join(measured)}")


def choose(
    source: Path,
    target: Path,
    limit: float,
    windows: list[list[int]],
    trying: Callable[[Candidate], Report],
    text: list[list[int]] | None = None,
) -> tuple[Candidate, Loss]:
    """Writes the smallest checkpoint whose mean divergence from the source, in nats per token, is at most `limit`.

    It is measured through the engine, on windows that were not calibrated with; other text is likely to be within the
    limit as well.

    Raises:
        ModelError: target_exists, or what `Trials`, `first_within` and `quantize` raise.
    """
    if target.exists():
        raise ModelError("target_exists", f"{target}: is there already; remove it, or name another directory")
    trials = Trials(source, windows, text)
    kept: dict[str, Path] = {}  # what is good enough

    def loss(candidate: Candidate) -> Loss:
        trial = target.with_name(f"{target.name}.trial{len(kept)}")
        shutil.rmtree(trial, ignore_errors=True)
        lost = trials.loss(candidate, trial, trying(candidate))
        if lost.within(limit):
            kept[str(candidate)] = trial
        else:
            shutil.rmtree(trial)
        return lost

    try:
        found = first_within(limit, loss)
        kept[str(found[0])].replace(target)
    finally:
        for trial in kept.values():
            shutil.rmtree(trial, ignore_errors=True)
    return found


def _subject(directory: Path, length: int) -> Subject:
    return Subject(EngineConfig(model_name=directory.name, model_uri=str(directory)), length)
