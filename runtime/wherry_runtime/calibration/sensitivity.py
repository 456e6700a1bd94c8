"""How much the model loses by each matrix in each number of bits, measured on the model itself.

One matrix at a time is rounded, and what that does to the predictions is measured: their Kullback-Leibler divergence
from the model's own. It grows with the square of the error, as any smooth function does near its least value, so one
measurement of a matrix is enough: other numbers of bits are reckoned from their squared output error.
"""

import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional

from wherry_runtime.calibration.allocation import Option, within
from wherry_runtime.calibration.matrices import Layer, linears, matrices
from wherry_runtime.calibration.pipeline import Report, check
from wherry_runtime.calibration.states import States, rows
from wherry_runtime.calibration.walk import Walk
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.solvers.inputs import Inputs

PROBES = 4  # windows that divergence is measured on
ROWS = 128  # positions of each


@dataclass(frozen=True)
class Sensitivity:
    """Matrices that are held as one, as they read the same inputs.

    Attributes:
        options: for each of the method's `mixes`: bits, and nats per token.
    """

    names: tuple[str, ...]
    weights: int
    options: list[Option]


def mixed(found: list[Sensitivity], recipe: Recipe, settings: Settings) -> dict[str, Settings]:
    """Each matrix's settings, with at most `settings.bits_per_weight` on average.

    Raises:
        ModelError: too_few_bits: there are no settings with as few.
    """
    weights = sum(one.weights for one in found)
    try:
        chosen = within([one.options for one in found], settings.bits_per_weight * weights)
    except ValueError as error:
        least = sum(min(option.size for option in one.options) for one in found) / weights
        raise ModelError("too_few_bits", f"{recipe.name} takes {least:.2f} bits per weight at least") from error
    of = [recipe.mixed(settings, place) for place in range(len(recipe.mixes))]
    return {name: of[place] for one, place in zip(found, chosen, strict=True) for name in one.names}


class Probe:
    """A model to be measured, layer by layer.

    Args:
        windows: token ids to calibrate with; the first ones are measured on.
        folder: for what is between layers.
    """

    def __init__(
        self, source: Path, recipe: Recipe, settings: Settings, windows: list[list[int]], folder: Path
    ) -> None:
        length = len(windows[0])
        self._recipe = recipe
        self._settings = [recipe.mixed(settings, place) for place in range(len(recipe.mixes))]
        self._writer = recipe.writer(self._settings[0], [])
        self._walk = Walk(source, length)
        self._layers = [self._walk.layer(index) for index in range(self._walk.num_layers)]
        self._origins = self._walk.model.origins()
        self._at = torch.arange(length)[:: max(1, length // ROWS)]
        self._count = min(PROBES, len(windows))
        width = self._walk.model.config.hidden_size
        (folder / "probes").mkdir()
        self._probes = States(folder / "probes", self._count, length, width)
        self._all = States(folder, len(windows), length, width)
        self._expected = self._start(windows)

    def run(self, report: Report) -> list[Sensitivity]:
        """All matrices, in the order of the layers."""
        found: list[Sensitivity] = []
        for index, layer in enumerate(self._layers):
            report(index, len(self._layers))
            for linear, inputs in self._inputs(index, layer).items():
                found.append(self._measured(index, linear, inputs))
        report(len(self._layers), len(self._layers))
        return found

    def _start(self, windows: list[list[int]]) -> list[torch.Tensor]:
        """Fills the states before each layer; the model's own log-probabilities [S, vocab_size] of each probe."""
        first = self._all.create(0)
        for i, window in enumerate(windows):
            rows(first, i).copy_(self._walk.start(window))
        states = [self._probes.create(index) for index in range(len(self._layers))]
        expected = []
        for i in range(self._count):
            x = rows(first, i)
            for index, layer in enumerate(self._layers):
                rows(states[index], i).copy_(x)
                x = self._walk.through(layer, x)
            expected.append(self._walk.logprobs(x, self._at))
        for file in (first, *states):
            file.flush()
        return expected

    def _inputs(self, index: int, layer: Layer) -> dict[Linear, Inputs]:
        """What goes into each matrix of a layer; what comes out of it is kept for the next one."""
        found = {linear: Inputs.empty(linear.num_inputs) for linear in linears(layer)}

        def watch(linear: Linear, x: torch.Tensor) -> None:
            if linear in found:
                found[linear].add(x)

        before, after = self._all.open(index), self._all.create(index + 1)
        for i in range(len(before)):
            rows(after, i).copy_(self._walk.through(layer, rows(before, i), watch))
        after.flush()
        self._all.remove(index)
        return {
            linear: inputs if inputs.rows else Inputs.unknown(linear.num_inputs) for linear, inputs in found.items()
        }

    def _measured(self, index: int, linear: Linear, inputs: Inputs) -> Sensitivity:
        if linear.weight is None or self._writer is None:
            raise TypeError("packed weights cannot be quantized again")
        own, weight = matrices(linear, self._origins), linear.weight.clone()
        sizes, errors = [], []
        loss = 0.0
        for place, settings in enumerate(self._settings):
            rounded = [self._recipe.round(weight[matrix.rows].float(), inputs, settings) for matrix in own]
            sizes.append(8 * sum(t.nbytes for one in rounded for t in self._writer.tensors(one).values()))
            found = torch.empty(weight.shape)
            for matrix, one in zip(own, rounded, strict=True):
                found[matrix.rows] = one.dequantized()
            errors.append(float(inputs.error(weight.float() - found).sum()))
            if place == 0:
                linear.weight.copy_(found)
                loss = self._divergence(index)
                linear.weight.copy_(weight)
        unit = loss / errors[0] if errors[0] else 0.0
        options = [Option(size, unit * error) for size, error in zip(sizes, errors, strict=True)]
        return Sensitivity(tuple(matrix.name for matrix in own), weight.numel(), options)

    def _divergence(self, index: int) -> float:
        """Mean of the probes' rows, as layer `index` is now."""
        total, states = 0.0, self._probes.open(index)
        for i, expected in enumerate(self._expected):
            x = rows(states, i)
            for layer in self._layers[index:]:
                x = self._walk.through(layer, x)
            found = self._walk.logprobs(x, self._at)
            total += float(functional.kl_div(found, expected, log_target=True, reduction="batchmean"))
        return total / len(self._expected)


def sensitivities(
    source: Path, target: Path, recipe: Recipe, settings: Settings, windows: list[list[int]], report: Report
) -> list[Sensitivity]:
    """Of all matrices of the layers of the model in `source`, which is to be quantized to `target`.

    What is between layers is kept on disk beside the target meanwhile.

    Raises:
        ModelError: as `pipeline.check`.
    """
    check(source, target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as folder, torch.inference_mode():
        return Probe(source, recipe, settings, windows, Path(folder)).run(report)
