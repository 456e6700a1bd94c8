"""Quantizes a checkpoint, layer by layer, in a directory of its own that becomes the result when all is done.

Text goes through the model that is being quantized: a layer's inputs are what the quantized layers before it make. What
is between two layers is on disk, and so is every layer that is done; a run that was cut off goes on with the next one,
to the same bytes.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch

from wherry_runtime.calibration.checkpoint import Source, shard_name, write_rest, write_shard
from wherry_runtime.calibration.folds import Fold, folds
from wherry_runtime.calibration.states import States, clear, rows
from wherry_runtime.calibration.walk import Reached, Walk
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import as_stored
from wherry_runtime.models.decoder import Decoder, DecoderLayer
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.layouts.base import Writer
from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.solvers.inputs import Inputs
from wherry_runtime.quantization.storage import Storage

PROGRESS = "progress.json"
Report = Callable[[int, int], None]  # layers that are done, and all of them


@dataclass(frozen=True)
class Job:
    """What is to be done.

    Attributes:
        windows: token ids to calibrate with, all of one length; empty for methods that need none.
        mix: settings of each matrix, where they differ.
    """

    source: Path
    target: Path
    recipe: Recipe
    settings: Settings
    windows: list[list[int]]
    mix: Mapping[str, Settings] = field(default_factory=dict)

    def of(self, matrix: str) -> Settings:
        """The settings of one matrix."""
        return self.mix.get(matrix, self.settings)

    def digest(self) -> str:
        """Of everything that the result depends on but the version of the code."""
        files = [(p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(self.source.glob("*")) if p.is_file()]
        known = [self.recipe.name, msgspec.to_builtins([self.settings, self.mix]), self.windows, files]
        return hashlib.sha256(json.dumps(known).encode()).hexdigest()


def quantize(job: Job, report: Report) -> None:
    """Writes the quantized checkpoint to `job.target`.

    Raises:
        ModelError: as `check`, or unsupported_model.
    """
    outline = check(job.source, job.target)
    work = job.target.with_name(job.target.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    done = _resumed(work, job)
    source = Source(job.source)
    matrices = [list(_linears(layer)) for layer in outline.layers]
    shapes = [(part.stop - part.start, m.num_inputs) for layer in matrices for m in layer for part in m.rows.values()]
    writer = job.recipe.writer(job.settings, shapes)
    count = len(outline.layers) + 1
    steps = (
        _calibrated(job, work, done, writer) if job.recipe.calibrates else _plain(job, matrices, source, done, writer)
    )
    of_layers = {name for layer in outline.layers for part in layer.parts() for name in part.slots()}
    report(done, count)
    for index, tensors in steps:
        rest = {n: source.read(n) for part in outline.layers[index].parts() for n in part.slots() if n not in tensors}
        kept = {n: t for n, t in rest.items() if n.removesuffix(".weight") not in _quantized(matrices[index])}
        write_shard(work / shard_name(index, count), {**kept, **tensors})
        _note(work, job, index + 1)
        report(index + 1, count)
    shards = [work / shard_name(i, count) for i in range(count)]
    write_shard(shards[-1], {name: source.read(name) for name in source.names if name not in of_layers})
    write_rest(job.source, work, shards, None if writer is None else _config(writer, job))
    (work / PROGRESS).unlink()
    clear(work)
    work.replace(job.target)
    report(count, count)


def check(source: Path, target: Path) -> Decoder:
    """The model without memory for its weights, if it can be quantized, to where nothing is yet.

    Raises:
        ModelError: target_exists, quantized_already, unsupported_architecture, or what is wrong with the source.
    """
    if target.exists():
        raise ModelError("target_exists", f"{target}: is there already; remove it, or name another directory")
    if read_json(source / "config.json").get("quantization_config"):
        raise ModelError(
            "quantized_already", f"{source}: quantized already; begin with the checkpoint it was made from"
        )
    return _outline(source)


def _resumed(work: Path, job: Job) -> int:
    """Layers that an earlier run of the same job finished; what another job left is removed."""
    try:
        noted = json.loads((work / PROGRESS).read_bytes())
        if noted["digest"] == job.digest():
            return int(noted["layers"])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    for path in work.iterdir():
        path.unlink()
    return 0


def _note(work: Path, job: Job, layers: int) -> None:
    partial = work / f"{PROGRESS}.partial"
    with partial.open("w") as file:
        json.dump({"digest": job.digest(), "layers": layers}, file)
        file.flush()
        os.fsync(file.fileno())
    partial.replace(work / PROGRESS)


def _outline(directory: Path) -> Decoder:
    """The model without memory for its weights.

    Raises:
        ModelError: unsupported_architecture, where the matrices are not those of the checkpoint, which is written anew.
    """
    config = read_config(directory)
    if config.recurrent or config.experts or config.norm.offset or not as_stored(config):
        raise ModelError(
            "unsupported_architecture",
            f"{directory}: {config.architecture} is not quantized ahead: its tensors are held otherwise than the "
            "checkpoint has them; serve it with --quantization int8 or int4",
        )
    return Decoder(config, 1, Storage(torch.float32, torch.device("meta")))


def _linears(layer: DecoderLayer) -> Iterator[Linear]:
    return (part for part in layer.parts() if isinstance(part, Linear))


def _quantized(matrices: list[Linear]) -> set[str]:
    return {name for matrix in matrices for name in matrix.rows}


def _written(name: str, rounded: Any, writer: Writer | None, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    if writer is None:
        return {f"{name}.weight": rounded.dequantized().to(dtype)}
    return {f"{name}.{suffix}": tensor for suffix, tensor in writer.tensors(rounded).items()}


def _config(writer: Writer, job: Job) -> dict[str, Any]:
    if not job.mix:
        return writer.config(job.settings)
    if writer.mixed is None:
        raise TypeError(f"what {job.recipe.name} writes has the same bits for all matrices")
    return writer.mixed(job.mix)


def _plain(
    job: Job, matrices: list[list[Linear]], source: Source, done: int, writer: Writer | None
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Layer by layer, one matrix in memory at a time."""
    for index in range(done, len(matrices)):
        tensors: dict[str, torch.Tensor] = {}
        for name in sorted(_quantized(matrices[index])):
            weight = source.read(f"{name}.weight")
            rounded = job.recipe.round(weight.float(), Inputs.empty(0), job.of(name))
            tensors |= _written(name, rounded, writer, weight.dtype)
        yield index, tensors


def _calibrated(
    job: Job, work: Path, done: int, writer: Writer | None
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Layer by layer, with what comes out of the quantized layers before."""
    length = len(job.windows[0])
    walk = Walk(job.source, length)
    states = States(work, len(job.windows), length, walk.model.config.hidden_size)
    with torch.inference_mode():
        if not done:
            first = states.create(0)
            for i, window in enumerate(job.windows):
                rows(first, i).copy_(walk.start(window))
            first.flush()
        for index in range(done, walk.num_layers):
            quantizer = LayerQuantizer(walk, walk.layer(index), states, index, job)
            tensors = quantizer.run(writer)
            quantizer.pass_on()
            del quantizer
            walk.drop(index)
            yield index, tensors  # which are written, and noted, before the inputs go
            states.remove(index)


class LayerQuantizer:
    """One layer of a calibrated job."""

    def __init__(self, walk: Walk, layer: DecoderLayer, states: States, index: int, job: Job) -> None:
        self._walk = walk
        self._layer = layer
        self._states = states
        self._index = index
        self._job = job
        self._before = states.open(index)

    def run(self, writer: Writer | None) -> dict[str, torch.Tensor]:
        """Rounds the layer's matrices in place; the tensors to write."""
        tensors: dict[str, torch.Tensor] = {}
        order = self._order()
        found = self._inputs(order)
        if self._job.recipe.scales is not None:
            tensors |= self._fold(found)
        for position, linear in enumerate(order):
            again = position and self._job.settings.true_sequential and self._job.recipe.scales is None
            inputs = self._inputs([linear])[linear] if again else found[linear]
            tensors |= self._round(linear, inputs, writer)
        return tensors

    def pass_on(self) -> None:
        """Writes what comes out of the layer, for the next one."""
        after = self._states.create(self._index + 1)
        for i in range(len(self._before)):
            rows(after, i).copy_(self._walk.through(self._layer, rows(self._before, i)))
        after.flush()

    def _order(self) -> list[Linear]:
        """The matrices in the order of computation."""
        order: list[Linear] = []
        self._walk.run(self._layer, rows(self._before, 0), lambda linear, x: order.append(linear))
        return list(dict.fromkeys(order))

    def _inputs(self, wanted: list[Linear]) -> dict[Linear, Inputs]:
        """What goes into some matrices as the layer is now."""
        found = {linear: Inputs.empty(linear.num_inputs) for linear in wanted}

        def watch(linear: Linear, x: torch.Tensor) -> None:
            if linear in found:
                found[linear].add(x)
                if len(found) == 1:
                    raise Reached

        for i in range(len(self._before)):
            self._walk.run(self._layer, rows(self._before, i), watch)
        return found

    def _fold(self, found: dict[Linear, Inputs]) -> dict[str, torch.Tensor]:
        """Scales inputs and weights; the other tensors that this changes."""
        changed: dict[str, torch.Tensor] = {}
        recipe, settings = self._job.recipe, self._job.settings
        source = Source(self._job.source)
        for fold in folds(self._layer):
            weights = _weights(fold.linear)
            scales = recipe.scales(weights, found[fold.linear], settings, fold.rows) if recipe.scales else None
            if scales is None:
                continue
            tensors, scales = self._folded(fold, scales, source)
            changed |= tensors
            found[fold.linear] = found[fold.linear].divided(scales)
        return changed

    def _folded(self, fold: Fold, scales: torch.Tensor, source: Source) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """The tensors that change beside matrices, and the scales as they were applied."""
        if isinstance(fold.before, Linear):
            fold.apply(scales)
            bias = fold.before.bias
            parts = fold.before.rows.items()
            return {} if bias is None else {f"{n}.bias": bias[part].clone() for n, part in parts}, scales
        (name,) = fold.before.state()
        written = source.read(name)
        if not torch.equal(written.float(), fold.before.weight):
            raise ModelError(
                "unsupported_model", f"{name} is not held as it is written, so nothing can be folded into it"
            )
        # What the weights are multiplied with is what is left once the norm is rounded to the type it is written in.
        scaled = (written.float() / scales).to(written.dtype)
        scales = torch.where(scaled == 0, scales, written.float() / scaled.float())
        fold.apply(scales)
        return {name: scaled}, scales

    def _round(self, linear: Linear, inputs: Inputs, writer: Writer | None) -> dict[str, torch.Tensor]:
        tensors: dict[str, torch.Tensor] = {}
        weights = _weights(linear)
        for name, part in linear.rows.items():
            rounded = self._job.recipe.round(weights[part], inputs, self._job.of(name))
            if linear.weight is not None:
                tensors |= _written(name, rounded, writer, linear.weight.dtype)
                linear.weight[part] = rounded.dequantized().to(linear.weight.dtype)
        return tensors


def _weights(linear: Linear) -> torch.Tensor:
    if linear.weight is None:
        raise TypeError("packed weights cannot be quantized again")
    return linear.weight.float()
