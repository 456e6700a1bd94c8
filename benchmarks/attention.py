"""The native attention kernel against what the machine can do, measured in the same run.

    python benchmarks/attention.py [--threads N] [--shape 32/4/64] [--json FILE]

Decode is bound by reading keys and values: bytes of the cache / best time, as a share of the read bandwidth. Where a
layer's keys fit into the caches of the processor, more than 100% is possible. Prefill is bound by arithmetic: the work
of the two products over the keys that are seen (half the square), as a share of what the matrix product of the same
type reaches on a large matrix. Best of several runs: the machine may be busy.
"""

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from wherry_runtime.attention.native import AttentionKernels, NativeKVCache
from wherry_runtime.kernels.cpu.library import Pool, Program, Step, read_bandwidth, target
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.layers.rope import Rope
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.rope_config import RopeConfig
from wherry_runtime.models.ops import Attention

CONTEXT = 8192
BLOCK_SIZE = 16
ROWS = 512
LAYERS = 8  # caches in turn, so that decode reads memory and not the caches of the processor
DECODES = [(b, c) for b in (1, 4, 16) for c in (128, 1024, 4096, 8192)]
PREFILLS = [512, 2048, 4096]


@dataclass
class Result:
    """One line."""

    what: str
    cache: str
    batch: int
    context: int
    microseconds: float
    rate: float  # bytes or operations per second
    share: float  # of the limit


class Bench:
    """Layers of one shape over one type of cache."""

    def __init__(self, shape: tuple[int, int, int], stored: str, pool: Pool, tokens: int) -> None:
        heads, kv_heads, dim = shape
        self.shape = shape
        self.config = ModelConfig(
            family="bench",
            architecture="bench",
            dtype="float32",
            vocab_size=8,
            hidden_size=heads * dim,
            intermediate_size=64,
            num_layers=LAYERS,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=dim,
            max_position_embeddings=CONTEXT,
            norm_eps=1e-6,
            rope=RopeConfig(),
            tie_word_embeddings=True,
        )
        self.cache = NativeKVCache(self.config, tokens // BLOCK_SIZE, BLOCK_SIZE, stored=FORMATS[stored])
        rope = Rope(self.config.rope, dim, CONTEXT, dtype=torch.float32, device=torch.device("cpu"))
        kernels = AttentionKernels(self.config, self.cache, [rope], ROWS, pool.threads)
        width = (heads + 2 * kv_heads) * dim
        qkv, out = torch.randn(ROWS, width), torch.zeros(ROWS, heads * dim)
        self.program = Program(pool)
        for layer in range(LAYERS):
            attention = Attention(layer, heads, kv_heads, dim, None, None, None)
            kernels.record(self.program, attention, (qkv, width), (out, heads * dim))
        self.fill(tokens)

    def fill(self, tokens: int) -> None:
        """Plausible contents everywhere: a prompt in chunks."""
        for start in range(0, min(tokens, CONTEXT), ROWS):
            self.program.run(self.step([(start, ROWS)]))

    def step(self, sequences: list[tuple[int, int]]) -> Step:
        """Sequences of (tokens before, tokens now), each in blocks of its own."""
        blocks = np.random.default_rng(1).permutation(self.cache.num_blocks).astype(np.int32)
        per = (
            CONTEXT // BLOCK_SIZE
            if len(sequences) * CONTEXT <= len(blocks) * BLOCK_SIZE
            else len(blocks) // len(sequences)
        )
        rows = sum(n for _, n in sequences)
        tables = [blocks[i * per : (i + 1) * per] for i in range(len(sequences))]
        positions = np.concatenate([np.arange(s, s + n) for s, n in sequences])
        owners = np.repeat(np.arange(len(sequences)), [n for _, n in sequences])
        slots = np.concatenate(tables)[owners * per + positions // BLOCK_SIZE].astype(np.int64) * BLOCK_SIZE
        return Step(
            rows,
            positions=positions.astype(np.int64),
            slots=slots + positions % BLOCK_SIZE,
            first_rows=np.cumsum([0, *(n for _, n in sequences)]).astype(np.int64),
            table_starts=(np.arange(len(sequences)) * per).astype(np.int64),
            block_tables=np.concatenate(tables),
        )

    def seconds(self, sequences: list[tuple[int, int]], repeats: int) -> float:
        """Best time of one layer: rotation, writing to the cache, attention."""
        step = self.step(sequences)
        best = float("inf")
        for _ in range(repeats):
            start = time.perf_counter()
            self.program.run(step)
            best = min(best, (time.perf_counter() - start) / LAYERS)
        return best

    def decode(self, batch: int, context: int, bandwidth: float) -> Result:
        seconds = self.seconds([(context - 1, 1)] * batch, 20)
        layer = self.cache.layers[0]
        num_bytes = batch * context * layer.shape[1] / BLOCK_SIZE
        rate = num_bytes / seconds
        return Result("decode", self.cache.stored.name, batch, context, seconds * 1e6, rate, rate / bandwidth)

    def prefill(self, length: int, peak: float) -> Result:
        heads, _, dim = self.shape
        seconds = sum(self.seconds([(start, ROWS)], 3) for start in range(0, length, ROWS))
        rate = 4 * heads * dim * length * (length + 1) / 2 / seconds
        return Result("prefill", self.cache.stored.name, 1, length, seconds * 1e6, rate, rate / peak)


def peak_operations(pool: Pool, kind: str) -> float:
    """Operations per second of the matrix product in float32 or bfloat16: 512 × 2048 by 2048 × 2048."""
    rows, depth, columns = 512, 2048, 2048
    dtype = torch.float32 if kind == "f32" else torch.bfloat16
    x = torch.zeros(rows, depth + 64, dtype=dtype)
    weights = torch.zeros(columns * depth, dtype=dtype)
    y = torch.zeros(rows, columns)
    program = Program(pool)
    numbers = [columns // 64, depth, depth + 64, columns, 0, 0, 0]
    program.add(f"linear_{kind}", [x, weights, y, None], numbers)
    step = Step(rows)
    best = float("inf")
    for _ in range(20):
        start = time.perf_counter()
        program.run(step)
        best = min(best, time.perf_counter() - start)
    return 2 * rows * depth * columns / best


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--shape", default="32/4/64", help="query heads / key heads / head size")
    parser.add_argument("--formats", default="bfloat16,fp8,int8,float32")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    heads, kv_heads, dim = (int(n) for n in arguments.shape.split("/"))
    pool = Pool(arguments.threads)
    bandwidth = read_bandwidth(pool)
    peaks = {kind: peak_operations(pool, kind) for kind in ("bf16", "f32")}
    print(f"{target()}, {arguments.threads} threads, heads {arguments.shape}")
    print(
        f"read {bandwidth / 1e9:.1f} GB/s, bf16 {peaks['bf16'] / 1e9:.0f} GFLOP/s, f32 {peaks['f32'] / 1e9:.0f} GFLOP/s"
    )
    print(f"{'':8} {'cache':9} {'batch':>5} {'context':>7} {'µs/layer':>9} {'G/s':>8} {'of limit':>8}")
    results: list[Result] = []
    for stored in arguments.formats.split(","):
        bench = Bench((heads, kv_heads, dim), stored, pool, 4 * CONTEXT)
        peak = peaks["f32" if stored == "float32" else "bf16"]
        # Sixteen long sequences do not fit; those that do say as much.
        fitting = [(b, c) for b, c in DECODES if b * c <= 4 * CONTEXT]
        for result in [
            *(bench.decode(b, c, bandwidth) for b, c in fitting),
            *(bench.prefill(n, peak) for n in PREFILLS),
        ]:
            print(
                f"{result.what:8} {stored:9} {result.batch:5} {result.context:7} {result.microseconds:9.1f}"
                f" {result.rate / 1e9:8.1f} {result.share:8.1%}",
                flush=True,
            )
            results.append(result)
    if arguments.json:
        limits = {"read_bytes_per_s": bandwidth, **{f"{k}_operations_per_s": v for k, v in peaks.items()}}
        document = {"target": target(), "threads": arguments.threads, "shape": arguments.shape, "limits": limits}
        arguments.json.write_text(json.dumps({**document, "results": [asdict(r) for r in results]}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
