"""How much anonymous memory loading a checkpoint takes: `python -m tests.runtime.loading_memory DIRECTORY`.

A process of its own, in which freed memory goes back at once (`MALLOC_MMAP_THRESHOLD_`): what a heap happens to keep is
not what this is about. Prints bytes: the most at any time, the packed weights, and the largest matrix in float32.
"""

import gc
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from wherry_runtime.loading import loader
from wherry_runtime.loading.checkpoint import iterate_tensors
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.storage import Storage


def anonymous_bytes() -> int:
    """Counted page by page: the sum in /proc/self/status is kept in parts, and late by megabytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/smaps_rollup").read_text().splitlines()[1:])
    return int(lines["Anonymous"].split()[0]) * 1024


def load(directory: Path) -> Decoder:
    storage = Storage(torch.bfloat16, torch.device("cpu"), "int4", native=True)
    return loader.load_model(directory, read_config(directory), 64, storage)


def main(directory: Path) -> None:
    load(directory)  # what a first load ever brings along, threads and their memory
    gc.collect()
    before, most = anonymous_bytes(), 0

    def watched(directory: Path) -> Iterator[tuple[str, torch.Tensor]]:
        nonlocal most
        for pair in iterate_tensors(directory):
            yield pair
            most = max(most, anonymous_bytes() - before)

    loader.iterate_tensors = watched
    weights = sum(t.nbytes for t in load(directory).state().values())
    largest = 4 * max(t.numel() for _, t in iterate_tensors(directory))
    print(json.dumps({"most": most, "weights": weights, "largest": largest}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
