"""A model on two ranks with a core each, against one rank with a core: docs/performance/tensor-parallel.md.

    python -m benchmarks.tensor_parallel [--model 1.1b] [--formats bf16 int8 int4] [--rounds 4] [--json out.json]

Both engines are resident and take turns of a second or so; ratios are of neighbouring turns. An idle group computes
nothing and beats five times a second, so it is not stopped while it is not its turn (its ranks would take one another
for dead).

Beside them is what one thread and two read from memory, measured before each turn of batch 1: decoding cannot grow by
more, and on a machine whose cores share a memory this is less than 2.
"""

import argparse
import json
import os
import statistics
from collections import defaultdict
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from benchmarks.engine import models
from benchmarks.engine.process import EngineProcess
from benchmarks.engine.workload import Job
from rich.console import Console

from wherry_cli import bench_machine

FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {"dtype": "bfloat16"},
    "int8": {"dtype": "bfloat16", "quantization": "int8"},
    "int4": {"dtype": "bfloat16", "quantization": "int4"},
}
CPU = torch.device("cpu")
PREFILL, BATCHES, NEW_TOKENS = 512, (1, 8, 16), 36
MIB = 1 << 20


@contextmanager
def on_cores(count: int) -> Iterator[None]:
    """Processes that are started meanwhile get the first `count` of this process's cores."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(before)[:count])
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def start(args: argparse.Namespace, name: str, ranks: int, stack: ExitStack) -> EngineProcess:
    """An engine with a core for each rank."""
    directory = models.make(args.model)
    job = Job(
        engine="wherry",
        variant=f"{name} {ranks}",
        model=str(directory),
        weights=str(directory),
        vocab_size=models.vocab_size(directory),
        threads=1,
        prefill=(PREFILL,),
        batches=BATCHES,
        new_tokens=NEW_TOKENS,
        options={**FORMATS[name], "tensor_parallel": ranks},
    )
    with on_cores(ranks):
        return stack.enter_context(EngineProcess(job, stops=False))


def own_memory(pid: int) -> int:
    """Bytes that only this process has, and those that it shares with other ranks."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) * 1024 for name in ("RssAnon", "RssShmem"))


def compare(args: argparse.Namespace, name: str, console: Console) -> dict[str, Any]:
    """One format."""
    with ExitStack() as stack:
        engines = {ranks: start(args, name, ranks, stack) for ranks in (1, 2)}
        figures = [("prefill", PREFILL), *(("decode", batch) for batch in BATCHES)]
        found: dict[tuple[str, int], dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
        for number in range(args.rounds):
            for kind, size in figures:
                for ranks in (1, 2) if number % 2 else (2, 1):
                    if (kind, size) == ("decode", 1):
                        found["read bandwidth, GB/s", 0][ranks].append(bench_machine.read_bandwidth(ranks, CPU) / 1e9)
                    answer = engines[ranks].ask(kind=kind, size=size, number=number)
                    found[kind, size][ranks].append(float(answer["rate"]))
                    console.print(f"{name} round {number}: {kind} {size}, {ranks} ranks", style="dim")
        group = psutil.Process(engines[2].pid)
        memory = {
            1: [own_memory(engines[1].pid)],
            2: [own_memory(p.pid) for p in (group, *group.children())],
        }
    rows = {}
    for (kind, size), by_ranks in found.items():
        ratios = [two / one for one, two in zip(by_ranks[1], by_ranks[2], strict=True)]
        rows[f"{kind} {size}" if size else kind] = {
            "one": statistics.median(by_ranks[1]),
            "two": statistics.median(by_ranks[2]),
            "ratio": statistics.median(ratios),
            "ratios": ratios,
        }
    return {"rows": rows, "memory": memory}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.1b", choices=[*models.SHAPES])
    parser.add_argument("--formats", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    errors = Console(stderr=True)
    results = {name: compare(args, name, errors) for name in args.formats}
    print("| tokens/s | 1 rank, 1 core | 2 ranks, 1 core each | ratio | of |\n|---|---|---|---|---|")
    for name, result in results.items():
        for what, row in result["rows"].items():
            spread = f"{min(row['ratios']):.2f}–{max(row['ratios']):.2f}"
            print(f"| {name} {what} | {row['one']:.1f} | {row['two']:.1f} | {row['ratio']:.2f} | {spread} |")
        one, two = result["memory"][1][0], max(result["memory"][2])
        print(f"| {name} memory of a rank, MiB | {one / MIB:,.0f} | {two / MIB:,.0f} | {two / one:.0%} | |")
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
