"""Finds the smallest way of quantizing a model that keeps its quality, by trying on the model itself."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.calibration.pipeline import Job, Report, quantize
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quality.measure import Subject, compare
from wherry_runtime.quantization.recipes import known
from wherry_runtime.quantization.recipes.base import Recipe, Settings

HELD_OUT = 8  # one window of so many is for measuring


@dataclass(frozen=True)
class Candidate:
    """A method with settings."""

    recipe: Recipe
    settings: Settings

    @property
    def bits(self) -> float:
        """Of a weight, scales and zero points included."""
        bits = self.settings.bits or 8
        return bits + ((16 + bits) / self.settings.group if self.settings.group else 0)

    def __str__(self) -> str:
        chosen = self.settings
        return f"{self.recipe.name} {chosen.bits} bits, groups of {chosen.group}" if chosen.bits else self.recipe.name


def candidates() -> list[Candidate]:
    """What the methods offer, the smallest first."""
    offered = [Candidate(recipe, recipe.settled(s)) for recipe in known().values() for s in recipe.offers]
    return sorted(offered, key=lambda candidate: candidate.bits)


def choose(
    source: Path, target: Path, limit: float, windows: list[list[int]], trying: Callable[[Candidate], Report]
) -> tuple[Candidate, float]:
    """Writes the smallest checkpoint whose mean divergence from the source, in nats per token, is at most `limit`.

    It is measured through the engine, on windows that were not calibrated with.

    Raises:
        ModelError: none_good_enough with what was measured, too_little_text, or what `quantize` raises.
    """
    unseen, seen = windows[::HELD_OUT], [w for i, w in enumerate(windows) if i % HELD_OUT]
    if not seen:
        raise ModelError("too_little_text", "auto needs two windows at least: one to calibrate with, one to measure on")
    if target.exists():
        raise ModelError("target_exists", f"{target}: is there already; remove it, or name another directory")
    reference = _subject(source, len(unseen[0]))
    measured: list[str] = []
    for candidate in candidates():
        trial = target.with_name(f"{target.name}.{len(measured)}")
        shutil.rmtree(trial, ignore_errors=True)
        calibration = seen if candidate.recipe.calibrates else []
        quantize(Job(source, trial, candidate.recipe, candidate.settings, calibration), trying(candidate))
        subject = _subject(trial, len(unseen[0]))
        loss = compare(subject.scorer, reference.scorer, unseen, lambda: None).summary().divergence
        if loss <= limit:
            trial.replace(target)
            return candidate, loss
        shutil.rmtree(trial)
        measured.append(f"{candidate}: {loss:.4f}")
    raise ModelError(
        "none_good_enough", f"nothing keeps the divergence from {source} within {limit}: {'; '.join(measured)}"
    )


def _subject(directory: Path, length: int) -> Subject:
    return Subject(EngineConfig(model_name=directory.name, model_uri=str(directory)), length)
