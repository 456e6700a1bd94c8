"""Where the engine's memory goes: the table of docs/performance/memory.md.

    python -m benchmarks.engine_memory [--kv-tokens 32768] [--peers]

For each format of weights a process of its own imports what `wherry serve` imports, loads the model, computes a prompt
of 1,024 tokens and decodes 16 answers. Then its memory is taken apart:

- weights, and the KV cache (all of it, whether it was written to yet or not);
- everything else that is anonymous: nobody but this process has it, and only swap could take it away. Of it, what was
  there after the imports and before the model; the buffers of a step; and the rest;
- pages of files: code of libraries. Processes share them, and the kernel drops them when memory is short.

`--peers` adds llama.cpp's process on the same weights, if it is installed (`python -m benchmarks.engine.peers`).
"""

import argparse
import asyncio
import ctypes
import json
import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.engine import models, peers
from benchmarks.engine.workload import Job, memory
from rich.console import Console

MIB = 1 << 20
FORMATS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "int8": {"quantization": "int8"},
    "int4": {"quantization": "int4"},
}
PEER_FORMATS = {"bf16": "bf16", "int8": "q8_0", "int4": "q4_0"}
RUNNING, PROMPT, CONTEXT, NEW = 16, 1024, 32, 36
CUDA = re.compile(r"/nvidia/|/triton/|cuda|nvrtc|cublas|cudnn|nccl")
LIMIT_S = 300


def file_pages() -> tuple[int, int]:
    """Bytes of files in this process's memory: of CUDA's libraries, and of all others."""
    found = [0, 0]
    cuda = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if re.match(r"[0-9a-f]+-[0-9a-f]+ ", line):
            cuda = bool(CUDA.search(line))
            continue
        name, _, value = line.partition(":")
        if name in ("Rss", "Anonymous"):
            found[not cuda] += int(value.split()[0]) * 1024 * (1 if name == "Rss" else -1)
    return found[0], found[1]


def present(spans: list[tuple[int, int]]) -> int:
    """Bytes of some memory that are there: pages that were written to."""
    page = 4096
    total = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for first, end in spans:
        start = first // page * page
        pages = -(-(end - start) // page)
        flags = (ctypes.c_ubyte * pages)()
        if libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(end - start), flags):
            raise OSError(ctypes.get_errno(), "mincore")
        total += page * sum(flag & 1 for flag in flags)
    return total


def child(args: argparse.Namespace) -> dict[str, int]:
    """What one process measures of itself."""
    import wherry_runtime.server.app  # noqa: F401 - counted among the imports
    from wherry_protocol.engine_config import EngineConfig
    from wherry_runtime.engine.async_engine import AsyncEngine

    imported = memory()["anonymous"]
    # What only measures comes after.
    from wherry_cli import bench_machine
    from wherry_cli.bench_engine import Meter, held

    measuring = memory()["anonymous"] - imported

    async def serve() -> dict[str, int]:
        directory = models.make(args.model)
        config = EngineConfig(
            model_uri=str(directory),
            model_name="bench",
            threads=args.threads,
            dtype="bfloat16",
            max_running=RUNNING,
            max_model_len=args.kv_tokens // RUNNING,
            prefix_cache=False,
            **FORMATS[args.child],
        )
        engine = AsyncEngine(config)
        await engine.start()
        draw = random.Random(0)
        meter = Meter(engine, models.vocab_size(directory))

        def prompt(length: int) -> list[int]:
            return [draw.randrange(10, models.vocab_size(directory)) for _ in range(length)]

        await meter.stream(prompt(PROMPT), 1)
        await asyncio.gather(*(meter.stream(prompt(CONTEXT), NEW) for _ in range(RUNNING)))
        loaded = engine._ready()
        now, (cuda, files) = memory(), file_pages()
        weights, cache, _ = held(engine)
        written = present(bench_machine.tensor_spans(loaded.runner.cache))
        await engine.close()
        return {
            "weights": weights,
            "cache": cache,
            "imported": imported,
            "buffers": getattr(loaded.runner.model, "workspace_bytes", 0),
            "beside": now["anonymous"] - measuring - weights - written,
            "cuda_files": cuda,
            "files": files,
        }

    return asyncio.run(serve())


def measured(args: argparse.Namespace, name: str) -> dict[str, int]:
    """`child` in a process of its own."""
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        command = [sys.executable, "-m", "benchmarks.engine_memory", "--child", name, "--result", file.name]
        command += ["--model", args.model, "--threads", str(args.threads), "--kv-tokens", str(args.kv_tokens)]
        done = subprocess.run(command, check=False, timeout=LIMIT_S, cwd=models.ROOT, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        return dict(json.loads(Path(file.name).read_text()))


def llama(args: argparse.Namespace, name: str) -> dict[str, int]:
    """llama.cpp with as many running: weights as its file has them, and a cache of 256 tokens for each."""
    from benchmarks.engine.process import EngineProcess
    from benchmarks.engine.variants import Variant, prepare, weights

    variant = Variant("llamacpp", PEER_FORMATS[name], {"huge_pages": False})
    prepare(args.model, [variant])
    file = weights(variant, args.model)
    directory = models.make(args.model)
    job = Job(
        engine=variant.engine,
        variant=variant.name,
        model=str(directory),
        weights=str(file),
        vocab_size=models.vocab_size(directory),
        threads=args.threads,
        prefill=(PROMPT,),
        batches=(RUNNING,),
        prompt_tokens=CONTEXT,
        new_tokens=NEW,
        options=variant.options,
    )
    with EngineProcess(job) as engine:
        engine.ask(kind="prefill", size=PROMPT, number=0)
        found = engine.ask(kind="decode", size=RUNNING, number=0)
    config = json.loads((directory / "config.json").read_text())
    head = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    token = 2 * 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head
    cache = RUNNING * 256 * token
    anonymous = found["memory"]["anonymous"]
    size = file.stat().st_size
    return {
        "weights": size,
        "cache": args.kv_tokens * token,
        "beside": anonymous - size - cache,
        "files": found["memory"]["rss"] - anonymous,
    }


def rows(args: argparse.Namespace) -> Iterator[list[str]]:
    for name in args.only:
        found = {"Wherry": measured(args, name)}
        if args.peers and peers.installed("llamacpp"):
            found["llama.cpp"] = llama(args, name)
        for engine, m in found.items():
            sizes = [m.get(k) for k in ("weights", "cache", "beside", "imported", "buffers", "files", "cuda_files")]
            cells = ["–" if s is None else f"{s / MIB:,.0f}" for s in sizes]
            label = f"{engine} {name if engine == 'Wherry' else PEER_FORMATS[name].upper()}"
            share = m["beside"] / (m["weights"] + m["cache"])
            yield [label, *cells[:3], f"{share:.1%}", *cells[3:]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1.1b", choices=[*models.SHAPES])
    parser.add_argument("--only", nargs="+", default=list(FORMATS), choices=list(FORMATS))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--kv-tokens", type=int, default=RUNNING * 2048, help="for all sequences together")
    parser.add_argument("--peers", action="store_true")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        args.result.write_text(json.dumps(child(args)))
        return
    console = Console(soft_wrap=True, markup=False)
    header = ["MiB", "weights", "KV cache", "beside them", "of both", "imports", "buffers", "files", "files of CUDA"]
    console.print(f"| {' | '.join(header)} |\n|{'---|' * len(header)}", highlight=False)
    for row in rows(args):
        console.print(f"| {' | '.join(row)} |", highlight=False)


if __name__ == "__main__":
    main()
