"""How much anonymous memory loading a checkpoint takes: `python -m tests.runtime.loading_memory DIRECTORY`.

A process of its own, in which freed memory goes back at once (`MALLOC_MMAP_THRESHOLD_`): what a heap happens to keep is
not what this is about. Prints bytes. Rounded to int4 as it is loaded: the most at any time, the packed weights, and the
largest matrix in float32. In its own type, left in its file: what is taken before and after weights are packed, the
pages of the file that are there then, and the packed weights.
"""

import gc
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from wherry_runtime.loading import loader
from wherry_runtime.loading.checkpoint import iterate_tensors
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.mapped import Mapped
from wherry_runtime.quantization.storage import Storage


def anonymous_bytes() -> int:
    """Counted page by page: the sum in /proc/self/status is kept in parts, and late by megabytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Anonymous"].split()[0]) * 1024


def file_bytes(path: Path) -> int:
    """Of a mapped file, in this process's memory."""
    total, inside = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            inside = line.endswith(str(path.resolve()))
        elif inside and line.startswith("Rss:"):
            total += int(line.split()[1]) * 1024
    return total


def load(directory: Path, storage: Storage | None = None) -> Decoder:
    storage = storage or Storage(torch.bfloat16, torch.device("cpu"), "int4", native=True)
    return loader.load_model(directory, read_config(directory), 64, storage)


def left_in_file(directory: Path) -> dict[str, int]:
    gc.collect()
    before = anonymous_bytes()
    model = load(directory, Storage(torch.bfloat16, torch.device("cpu"), native=True, mapped=Mapped()))
    loaded = anonymous_bytes() - before
    matrices = model.unsettled()
    for matrix in matrices:
        for _, rows in matrix._left:
            rows.float().sum()  # as the first step reads everything
    read = file_bytes(directory / "model.safetensors")
    for matrix in matrices:
        matrix.settle()
    return {
        "mapped": loaded,
        "read": read,
        "settled": anonymous_bytes() - before,
        "file": file_bytes(directory / "model.safetensors"),
        "packed": sum(m.data.nbytes for m in matrices),
    }


def main(directory: Path) -> None:
    load(directory)  # what a first load ever brings along, threads and their memory
    gc.collect()
    before, most = anonymous_bytes(), 0

    def watched(directory: Path, mapped: Mapped | None) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for pair in iterate_tensors(directory, mapped):
            yield pair
            most = max(most, anonymous_bytes() - before)

    loader.iterate_tensors = watched
    weights = sum(t.nbytes for t in load(directory).state().values())
    largest = 4 * max(t.numel() for _, t in iterate_tensors(directory))
    loader.iterate_tensors = iterate_tensors
    print(json.dumps({"most": most, "weights": weights, "largest": largest, **left_in_file(directory)}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
