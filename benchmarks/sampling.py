"""What drawing tokens takes beside the model: the native kernels and PyTorch on the same logits.

    python -m benchmarks.sampling

Milliseconds a step, median, from logits in memory to tokens in Python, for a batch of rows that are all greedy, all at
temperature 1, or all with the filters of a typical chat. Logits are normal with a standard deviation of 3; a real
model's are more peaked, which makes filtered draws cheaper.
"""

import argparse
import statistics
import time

import numpy as np
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from wherry_protocol.worker import SamplingParams
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.sampling import Place, Sampler, TorchSampler, sample
from wherry_runtime.kernels.cpu.library import Pool, Program, Step
from wherry_runtime.kernels.cpu.model import pinned_cores
from wherry_runtime.kernels.cpu.sampling import NativeSampler
from wherry_runtime.scheduling.request import Request

ROWS = 64
SETTINGS: dict[str, dict[str, float]] = {
    "greedy": {"temperature": 0.0},
    "temperature 1": {},
    "0.7, top-p 0.9": {"temperature": 0.7, "top_p": 0.9},
    "0.7, top-k 50, top-p 0.9": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}


class Bench:
    """Logits in a head's buffer, and both ways to draw from them."""

    def __init__(self, vocab_size: int, threads: int) -> None:
        self.vocab_size = vocab_size
        self.buffer = torch.zeros(ROWS, -(-vocab_size // 64) * 64)
        self.source = torch.randn(ROWS, vocab_size, generator=torch.Generator().manual_seed(0)) * 3
        self.head = Program(Pool(threads, pinned_cores(threads)))
        self.native = NativeSampler(self.head, self.buffer, vocab_size)

    def seconds(self, sampler: Sampler, batch: int, params: dict[str, float], at_least_s: float) -> float:
        lives = [
            Live(Request(f"r{i}", [1, 2, 3], 1 << 20), SamplingParams(**params), i, frozenset())  # type: ignore[arg-type]
            for i in range(batch)
        ]
        places = [Place(live) for live in lives]
        step = Step(batch, sampled_rows=np.arange(batch))
        logits = self.buffer[:batch, : self.vocab_size]
        measured: list[float] = []
        while len(measured) < 5 or sum(measured) < at_least_s:
            logits.copy_(self.source[:batch])
            began = time.perf_counter()
            if sampler is self.native:
                self.head.run(step)
            results = sample(logits, places, sampler)
            measured.append(time.perf_counter() - began)
            for live, result in zip(lives, results, strict=True):
                live.note_token(getattr(result, "token", 0))
        return statistics.median(measured)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 151936])
    parser.add_argument("--seconds", type=float, default=0.3, help="for each measurement")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = Table("vocabulary", "settings", "batch", "PyTorch, ms", "native, ms", "ratio")
    cases = [(v, s, b) for v in args.vocab for s in SETTINGS for b in args.batch]
    benches = {v: Bench(v, args.threads) for v in args.vocab}
    with torch.inference_mode():
        for vocab_size, name, batch in track(cases, "sampling"):
            bench = benches[vocab_size]
            slow, fast = (
                bench.seconds(s, batch, SETTINGS[name], args.seconds) * 1000 for s in (TorchSampler(), bench.native)
            )
            table.add_row(str(vocab_size), name, str(batch), f"{slow:.3f}", f"{fast:.3f}", f"{slow / fast:.1f}")
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
