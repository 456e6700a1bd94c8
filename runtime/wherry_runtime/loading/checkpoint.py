"""Tensors of a checkpoint, one by one, from memory-mapped safetensors files."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from wherry_runtime.layers.linear import Slot
from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_HEADER = 100_000_000  # bytes; as the format says
# Buffers that old checkpoints carry and nobody reads.
IGNORED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$|\.attn\.bias$")


def shard_files(directory: Path) -> list[Path]:
    """The checkpoint's files, in order.

    Raises:
        ModelError: missing_weights, missing_shard, or what is wrong with the index.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    if not (directory / INDEX).is_file():
        raise ModelError("missing_weights", f"{directory}: neither {SINGLE} nor {INDEX} is there")
    weight_map = read_json(directory / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError("bad_json", f"{directory / INDEX}: weight_map must be an object of tensor name to file name")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelError("bad_json", f"{directory / INDEX}: {name!r} is not a plain file name")
        if not (directory / name).is_file():
            raise ModelError("missing_shard", f"{directory / name}: {INDEX} names it, but it is not there")
    return [directory / name for name in names]


def read_header(path: Path) -> bytes:
    """The JSON at the start of a safetensors file, as it is.

    Raises:
        ModelError: damaged_shard.
    """
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = file.read(size) if size <= LARGEST_HEADER else b""
    if len(header) != size:
        raise ModelError("damaged_shard", f"{path}: damaged or truncated; copy or download it again")
    return header


def iterate_tensors(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of the checkpoint with its name. A tensor is a view of the mapped file: copy it before the next.

    Raises:
        ModelError: as `shard_files`, or damaged_shard when a file is truncated or not safetensors.
    """
    for path in shard_files(directory):
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - safe_open has keys() and is not iterable
                    if not IGNORED.search(name):
                        yield name, shard.get_tensor(name)
        except (SafetensorError, OSError) as e:
            size = path.stat().st_size if path.exists() else 0
            raise ModelError(
                "damaged_shard", f"{path}: damaged or truncated ({size} bytes: {e}); copy or download it again"
            ) from e


def fill(slots: Mapping[str, Slot], tensors: Iterator[tuple[str, torch.Tensor]], directory: Path) -> None:
    """Puts each tensor into the slot of its name, which converts it to how it is held.

    Raises:
        ModelError: wrong_shape, bad_weights, unexpected_tensors or missing_tensors.
    """
    missing = dict(slots)
    unexpected = []
    for name, tensor in tensors:
        slot = missing.pop(name, None)
        if slot is None:
            unexpected.append(name)
        elif slot.shape != tuple(tensor.shape):
            shapes = f"{list(tensor.shape)} where config.json asks for {list(slot.shape)}"
            raise ModelError("wrong_shape", f"{directory}: tensor {name} is {shapes}")
        else:
            _fill(slot, tensor, f"{directory}: tensor {name}")
    if missing:
        raise ModelError("missing_tensors", f"{directory}: the checkpoint lacks {_some(sorted(missing))}")
    if unexpected:
        raise ModelError(
            "unexpected_tensors", f"{directory}: no place for {_some(unexpected)}; is config.json its own?"
        )


def _fill(slot: Slot, tensor: torch.Tensor, what: str) -> None:
    try:
        slot.fill(tensor)
    except ValueError as e:
        raise ModelError("bad_weights", f"{what}: {e}") from e


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
