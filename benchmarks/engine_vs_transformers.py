"""Tokens per second of Wherry's engine and of transformers' `generate`, same model, same prompts, greedy, CPU.

    python -m benchmarks.engine_vs_transformers [--model examples/models/tiny] [--dtype float32 bfloat16]
        [--batch 1 8] [--new-tokens 128] [--json out.json]

Each number is the best of `--runs` runs; the engine is measured through AsyncEngine, so with detokenization and events.
Transformers runs with its static batch, padded on the left, and its KV cache.
"""

import argparse
import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.worker import ExecuteRequest, Prompt, SamplingParams, Token
from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.engine.resources import cpu_threads

PROMPT_TOKENS = 32


def prompts(batch: int, vocab_size: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(10, vocab_size, (batch, PROMPT_TOKENS), generator=generator).tolist()


def best(runs: int, tick: Callable[[], None], run: Callable[[], int]) -> float:
    """Tokens per second of the fastest of `runs` runs, after one to warm up."""
    rates = []
    for _ in range(runs + 1):
        began = time.perf_counter()
        tokens = run()
        rates.append(tokens / (time.perf_counter() - began))
        tick()
    return max(rates[1:])


def measure_transformers(args: argparse.Namespace, dtype: str, tick: Callable[[], None]) -> dict[int, float]:
    model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype=getattr(torch, dtype)).eval()
    settings = transformers.GenerationConfig(
        max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False, pad_token_id=0
    )

    def run(inputs: torch.Tensor) -> int:
        out = model.generate(inputs, attention_mask=torch.ones_like(inputs), generation_config=settings)
        return int(out.shape[0] * (out.shape[1] - inputs.shape[1]))

    rates = {}
    for batch in args.batch:
        inputs = torch.tensor(prompts(batch, model.config.vocab_size))
        rates[batch] = best(args.runs, tick, lambda inputs=inputs: run(inputs))
    return rates


def measure_engine(args: argparse.Namespace, dtype: str, tick: Callable[[], None]) -> dict[int, float]:
    config = EngineConfig(
        model_name="m", model_uri=str(args.model), dtype=dtype, prefix_cache=False, threads=args.threads
    )
    params = SamplingParams(max_tokens=args.new_tokens, temperature=0, ignore_eos=True)

    async def one(engine: AsyncEngine, index: int, prompt: list[int]) -> int:
        request = ExecuteRequest(id=f"r{index}", model="m", prompt=Prompt(token_ids=prompt), sampling=params)
        return sum([len(e.ids) async for e in engine.generate(request) if isinstance(e, Token)])

    async def everyone(engine: AsyncEngine, batch: int) -> int:
        vocab_size = int(json.loads((args.model / "config.json").read_text())["vocab_size"])
        return sum(await asyncio.gather(*(one(engine, i, p) for i, p in enumerate(prompts(batch, vocab_size)))))

    rates = {}
    with asyncio.Runner() as runner:
        engine = AsyncEngine(config)
        runner.run(engine.start())
        for batch in args.batch:
            rates[batch] = best(args.runs, tick, lambda batch=batch: runner.run(everyone(engine, batch)))
        runner.run(engine.close())
    return rates


def main() -> None:
    parser = argparse.ArgumentParser(description="Engine against transformers, tokens per second")
    parser.add_argument("--model", type=Path, default=Path("examples/models/tiny"))
    parser.add_argument("--dtype", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 16])
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=cpu_threads())
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    transformers.logging.set_verbosity_error()
    results = []
    with Progress(transient=True) as progress:
        task = progress.add_task("measuring", total=2 * len(args.dtype) * len(args.batch) * (args.runs + 1))

        def tick() -> None:
            progress.advance(task)

        for dtype in args.dtype:
            ours, theirs = measure_engine(args, dtype, tick), measure_transformers(args, dtype, tick)
            results += [
                {"dtype": dtype, "batch": b, "engine": ours[b], "transformers": theirs[b], "ratio": ours[b] / theirs[b]}
                for b in args.batch
            ]
    table = Table("dtype", "batch", "engine tok/s", "transformers tok/s", "ratio", title=str(args.model))
    for r in results:
        table.add_row(
            r["dtype"], str(r["batch"]), f"{r['engine']:.0f}", f"{r['transformers']:.0f}", f"{r['ratio']:.2f}x"
        )
    Console().print(table)
    if args.json:
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "threads": args.threads}
        args.json.write_text(json.dumps({"versions": versions, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
