"""What more ranks would bring: a step taken apart on one rank and on two, and a model of it for four.

    python -m benchmarks.tensor_parallel_model [--model 1.1b] [--formats bf16 int8] [--batch 1 16] [--json out.json]

Ranks are threads of one process here, each with a pool of one thread on a core of its own and its own part of the
weights; they meet in shared memory as processes do. Each kernel of a decode step is timed on rank 0, the barrier after
it included, while the others compute the same step.

- *split*: kernels whose work the ranks share: products, attention, the MLP's activation.
- *whole*: what every rank does for itself: norms, and rounding what they give.
- *meeting*: sums and logits, with the waiting for the slowest rank.

For n ranks: split(1) / n + whole(1) + meeting(2) · n / 2, as each rank reads n summands. The prediction for two ranks
stands beside what two ranks measure; that for four assumes that each has a core, and memory, like each of two has here.
"""

import argparse
import json
import statistics
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from benchmarks.engine import models

from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.kernels.cpu.model import CAPACITY, NativeModel
from wherry_runtime.kernels.cpu.ranks import SharedMemoryRanks, shared_bytes
from wherry_runtime.kvcache.formats import format_of
from wherry_runtime.kvcache.native import NativeKVCache
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.shard import Shard
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

FORMATS: dict[str, Any] = {"bf16": "none", "int8": "int8", "int4": "int4"}
MEETINGS = ("all_reduce", "meet")
WHOLE = ("rms_norm", "embed", "attention_plan", "argmax", "to_bf16", "quantize_int8")
CONTEXT, BLOCK_SIZE, REPEATS = 128, 16, 12
Parts = dict[str, float]  # seconds


def group(directory: Path, quantization: Any, size: int, blocks: int) -> list[ModelRunner]:
    """All ranks, with a thread each."""
    config = read_config(directory)
    memory = torch.zeros(shared_bytes(size, config, CAPACITY), dtype=torch.uint8)
    runners = []
    for shard in Shard(0, size).everyone():
        storage = Storage(torch.bfloat16, torch.device("cpu"), quantization, native=True)
        model = load_model(directory, config, 2048, storage, shard=shard)
        cache = NativeKVCache(model.config, blocks, BLOCK_SIZE, stored=format_of(torch.bfloat16))
        ranks = SharedMemoryRanks(memory, shard, config, CAPACITY, 1) if size > 1 else None
        runners.append(ModelRunner(NativeModel(model, cache, 1, ranks)))
    return runners


def step_parts(runner: ModelRunner, sequences: list[SequenceStep]) -> Parts:
    """One step, by kernel."""
    prepared = runner.prepare(sequences)
    model = runner.model
    if not isinstance(model, NativeModel):
        raise TypeError("native kernels only")
    seconds: Parts = defaultdict(float)
    piece = prepared.work[0]
    piece.layers.put_tokens([s.tokens[0] for s in prepared.sequences])
    for stage in (*model.layers, *model.head):
        for name, spent in stage.program.profile(piece.layers):
            seconds[name] += spent
    return seconds


def measured(runners: list[ModelRunner], batch: int) -> Parts:
    """Medians over some steps, in split, whole and meeting."""
    blocks = -(-(CONTEXT + 1) // BLOCK_SIZE)
    sequences = [
        SequenceStep(str(i), [5 + i], CONTEXT, np.arange(blocks, dtype=np.int32) + i * blocks, samples=True)
        for i in range(batch)
    ]
    found: dict[str, list[float]] = defaultdict(list)
    with ThreadPoolExecutor(len(runners)) as threads:
        one: Callable[[ModelRunner], Parts] = lambda runner: step_parts(runner, sequences)  # noqa: E731
        for _ in range(REPEATS):
            first = list(threads.map(one, runners))[0]  # noqa: RUF015 - all of them must run
            sums: Parts = defaultdict(float)
            for name, spent in first.items():
                sums["meeting" if name in MEETINGS else "whole" if name in WHOLE else "split"] += spent
            for part in ("split", "whole", "meeting"):
                found[part].append(sums[part])
            found["total"].append(sum(sums.values()))
    return {part: statistics.median(values) for part, values in found.items()}


def model(one: Parts, two: Parts, ranks: int) -> float:
    """Seconds of a step on so many ranks."""
    return one["split"] / ranks + one["whole"] + two["meeting"] * ranks / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.1b", choices=[*models.SHAPES])
    parser.add_argument("--formats", nargs="+", default=["bf16", "int8"], choices=list(FORMATS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 16])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    directory = models.make(args.model)
    results = {}
    for name in args.formats:
        blocks = max(args.batch) * -(-(CONTEXT + 1) // BLOCK_SIZE)
        groups = {size: group(directory, FORMATS[name], size, blocks) for size in (1, 2)}
        for batch in args.batch:
            one, two = (measured(groups[size], batch) for size in (1, 2))
            four = model(one, two, 4)
            results[f"{name} batch {batch}"] = {"one": one, "two": two, "predicted": model(one, two, 2), "four": four}
    print("| ms in a decode step | split | whole | 1 rank | meeting | 2 ranks | predicted | 4 ranks, predicted |")
    print("|---|---|---|---|---|---|---|---|")
    for name, r in results.items():
        one, two = r["one"], r["two"]
        cells = [one["split"], one["whole"], one["total"], two["meeting"]]
        text = " | ".join(f"{1e3 * cell:.2f}" for cell in cells)
        ratios = [f"{1e3 * s:.2f} ({one['total'] / s:.2f}×)" for s in (two["total"], r["predicted"], r["four"])]
        print(f"| {name} | {text} | {' | '.join(ratios)} |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
