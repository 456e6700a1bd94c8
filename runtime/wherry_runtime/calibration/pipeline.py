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
from wherry_runtime.calibration.layer import LayerQuantizer
from wherry_runtime.calibration.matrices import Matrix, kept, linears, matrices
from wherry_runtime.calibration.states import States, clear, rows
from wherry_runtime.calibration.walk import Walk
from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import AnyDecoder, empty_model
from wherry_runtime.models.layout import layer_prefix
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
    config = outline.config
    work = job.target.with_name(job.target.name + ".partial")
    work.mkdir(parents=True, exist_ok=True)
    done = _resumed(work, job)
    source, origins = Source(job.source, outline), outline.origins()
    layers = [[matrix for part in linears(layer) for matrix in matrices(part, origins)] for layer in outline.layers]
    writer = job.recipe.writer(job.settings, [matrix.shape for layer in layers for matrix in layer])
    count = len(layers) + 1
    if job.recipe.calibrates:
        steps = _calibrated(job, work, done, writer, source)
    else:
        steps = _plain(job, layers, source, done, writer)
    report(done, count)
    for index, tensors in steps:
        weights = {f"{matrix.name}.weight" for matrix in layers[index]}
        own = [name for name in source.names if name.startswith(f"{layer_prefix(config)}{index}.")]
        rest = {name: source.read(name) for name in own if name not in weights and name not in tensors}
        write_shard(work / shard_name(index, count), {**rest, **tensors})
        _note(work, job, index + 1)
        report(index + 1, count)
    shards = [work / shard_name(i, count) for i in range(count)]
    others = [name for name in source.names if not name.startswith(layer_prefix(config))]
    write_shard(shards[-1], {name: source.read(name) for name in others})
    write_rest(job.source, work, shards, None if writer is None else _config(writer, job, outline))
    (work / PROGRESS).unlink()
    clear(work)
    work.replace(job.target)
    report(count, count)


def check(source: Path, target: Path) -> AnyDecoder:
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


def _outline(directory: Path) -> AnyDecoder:
    """The model without memory for its weights.

    Raises:
        ModelError: unsupported_architecture.
    """
    config = read_config(directory)
    if config.encoder is not None:
        raise ModelError("unsupported_architecture", f"{directory}: {config.architecture} turns texts into vectors")
    if config.experts is not None and config.experts.fused:
        raise ModelError(
            "unsupported_architecture",
            f"{directory}: {config.architecture} has all experts of a layer in one tensor, for which there is no "
            "layout of quantized weights; serve it with --quantization int8 or int4",
        )
    return empty_model(config, 1, Storage(torch.float32, torch.device("meta")))


def _written(
    matrix: Matrix, rounded: Any, writer: Writer | None, source: Source, dtype: torch.dtype
) -> dict[str, torch.Tensor]:
    if writer is None:
        return {f"{matrix.name}.weight": source.turned(rounded.dequantized().to(dtype))}
    return {f"{matrix.name}.{suffix}": tensor for suffix, tensor in writer.tensors(rounded).items()}


def _config(writer: Writer, job: Job, outline: AnyDecoder) -> dict[str, Any]:
    names = outline.config.layout.names
    origins = outline.origins()
    plain = [origins[own].name for layer in outline.layers for part in kept(layer) for own in part.rows]
    if not job.mix:
        return writer.config(job.settings, [names.get("lm_head", "lm_head"), *plain])
    if writer.mixed is None:
        raise TypeError(f"what {job.recipe.name} writes has the same bits for all matrices")
    return writer.mixed(job.mix, [names.get("lm_head", "lm_head"), *plain])


def _plain(
    job: Job, layers: list[list[Matrix]], source: Source, done: int, writer: Writer | None
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Layer by layer, one matrix in memory at a time."""
    for index in range(done, len(layers)):
        tensors: dict[str, torch.Tensor] = {}
        for matrix in layers[index]:
            weight = source.matrix(matrix.name)
            rounded = job.recipe.round(weight.float(), Inputs.empty(0), job.of(matrix.name))
            tensors |= _written(matrix, rounded, writer, source, weight.dtype)
        yield index, tensors


def _calibrated(
    job: Job, work: Path, done: int, writer: Writer | None, source: Source
) -> Iterator[tuple[int, dict[str, torch.Tensor]]]:
    """Layer by layer, with what comes out of the quantized layers before."""
    length = len(job.windows[0])
    walk = Walk(job.source, length)
    states = States(work, len(job.windows), length, walk.model.config.hidden_size)
    origins = walk.model.origins()

    def round_(matrix: Matrix, inputs: Inputs) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        rounded = job.recipe.round(matrix.weights(), inputs, job.of(matrix.name))
        return rounded.dequantized(), _written(matrix, rounded, writer, source, matrix.dtype)

    with torch.inference_mode():
        if not done:
            first = states.create(0)
            for i, window in enumerate(job.windows):
                rows(first, i).copy_(walk.start(window))
            first.flush()
        for index in range(done, walk.num_layers):
            quantizer = LayerQuantizer(walk, index, states, source, origins, job.recipe, job.settings, round_)
            tensors = quantizer.run()
            quantizer.pass_on()
            del quantizer
            walk.drop(index)
            yield index, tensors  # which are written, and noted, before the inputs go
            states.remove(index)
