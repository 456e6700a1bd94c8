"""Tensors of a checkpoint, one by one, from memory-mapped safetensors or GGUF files."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from wherry_runtime.formats.detect import gguf_files, kind_of
from wherry_runtime.formats.gguf.reader import GGUFFile
from wherry_runtime.formats.safetensors.reader import LARGEST_HEADER
from wherry_runtime.formats.safetensors.shards import IGNORED, INDEX, SINGLE, safetensors_files
from wherry_runtime.layers.linear import Slot
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.gguf import GGUFCheckpoint
from wherry_runtime.quantization.mapped import Mapped
from wherry_runtime.quantization.packed import Rows, Turned


def shard_files(directory: Path) -> list[Path]:
    """The checkpoint's files, in order.

    Raises:
        ModelError: missing_weights, missing_shard, or what is wrong with the index.
    """
    if files := safetensors_files(directory) or gguf_files(directory):
        return files
    raise ModelError("missing_weights", f"{directory}: neither {SINGLE} nor {INDEX} nor a GGUF file is there")


def read_header(path: Path) -> bytes:
    """The JSON at the start of a safetensors file, or the header of a GGUF file, as it is.

    Raises:
        ModelError: damaged_shard or bad_gguf.
    """
    if kind_of(path) == "gguf":
        file = GGUFFile.open(path)
        return bytes(file.data[: file.header.data_start])
    with path.open("rb") as shard:
        size = int.from_bytes(shard.read(8), "little")
        header = shard.read(size) if size <= LARGEST_HEADER else b""
    if len(header) != size:
        raise ModelError("damaged_shard", f"{path}: damaged or truncated; copy or download it again")
    return header


def iterate_tensors(directory: Path, mapped: Mapped | None = None) -> Iterator[tuple[str, torch.Tensor]]:
    """Each tensor of the checkpoint with its name. A tensor is a view of the mapped file: copy it before the next.

    Args:
        mapped: is shown each tensor, and what it keeps needs no copy. Of others, the pages are let go of.

    Raises:
        ModelError: as `shard_files`, or damaged_shard when a file is truncated or not safetensors.
    """
    files, mapped = shard_files(directory), mapped or Mapped()
    if kind_of(files[0]) == "gguf":
        yield from GGUFCheckpoint.open(files).tensors()
        return
    for path in files:
        try:
            with safe_open(path, framework="pt") as shard:
                for name in shard.keys():  # noqa: SIM118 - safe_open has keys() and is not iterable
                    if not IGNORED.search(name):
                        tensor = shard.get_tensor(name)
                        mapped.show(tensor)
                        yield name, tensor
                        mapped.done(tensor)
        except (SafetensorError, OSError) as e:
            size = path.stat().st_size if path.exists() else 0
            raise ModelError(
                "damaged_shard", f"{path}: damaged or truncated ({size} bytes: {e}); copy or download it again"
            ) from e


def fill(slots: Mapping[str, Slot], tensors: Iterator[tuple[str, Rows | Turned]], directory: Path) -> None:
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


def _fill(slot: Slot, tensor: Rows | Turned, what: str) -> None:
    try:
        slot.fill(tensor)
    except ValueError as e:
        raise ModelError("bad_weights", f"{what}: {e}") from e


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
