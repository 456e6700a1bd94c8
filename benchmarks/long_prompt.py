"""What running streams feel of a long prompt that comes in: time between tokens before it and during it.

    python -m benchmarks.long_prompt [--model DIR] [--streams 8] [--prompt 4096] [--rounds 5] [--json FILE]
        [-- ENGINE FLAGS]

Streams of answers run; after a while a long prompt arrives, and its first token ends the round. The time between a
stream's tokens is compared before and during, as Wherry paces prompts (`max_itl_ratio`, 2 unless told otherwise), and
once more with `--max-itl-ratio 0`, which takes as much of a prompt per step as the token budget allows, as most engines
do.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import msgspec
from benchmarks.engine import models
from benchmarks.prefix_cache import some_tokens
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from wherry_protocol.engine_config import EngineConfig, from_args
from wherry_protocol.worker import ErrorEvent, ExecuteRequest, Prompt, SamplingParams, Token
from wherry_runtime.engine.async_engine import AsyncEngine

STREAM_PROMPT = 64
STREAM_ANSWER = 4000  # more than it takes; a stream stops when the long prompt is through
BEFORE = 40  # tokens of each stream before the long prompt comes


@dataclass
class Round:
    """Seconds between the tokens of all streams, and until the long prompt's first token."""

    before: list[float] = field(default_factory=list)
    during: list[float] = field(default_factory=list)
    first_token: float = 0.0


def request(name: str, tokens: list[int], new: int) -> ExecuteRequest:
    sampling = SamplingParams(max_tokens=new, temperature=0, ignore_eos=True)
    return ExecuteRequest(id=name, model="model", prompt=Prompt(token_ids=tokens), sampling=sampling)


async def one_round(engine: AsyncEngine, streams: int, prompt: int, rng: random.Random, name: str) -> Round:
    result, warm, stop = Round(), asyncio.Semaphore(0), asyncio.Event()
    gaps: list[list[float]] = [result.before]

    async def stream(number: int) -> None:
        last, count = 0.0, 0
        events = engine.generate(request(f"{name}-{number}", some_tokens(rng, STREAM_PROMPT), STREAM_ANSWER))
        async for event in events:
            if isinstance(event, ErrorEvent):
                raise SystemExit(f"the engine failed: {event}")
            if not isinstance(event, Token):
                continue
            now = time.perf_counter()
            if count > BEFORE // 4:  # by then the other streams' prompts are through
                gaps[0].append(now - last)
            last, count = now, count + 1
            if count == BEFORE:
                warm.release()
            if stop.is_set():
                break
        await events.aclose()

    async with asyncio.TaskGroup() as group:
        for i in range(streams):
            group.create_task(stream(i))
        for _ in range(streams):
            await warm.acquire()
        gaps[0] = result.during
        began = time.perf_counter()
        async for event in engine.generate(request(f"{name}-long", some_tokens(rng, prompt), 1)):
            if isinstance(event, Token):
                result.first_token = time.perf_counter() - began
        stop.set()
    return result


async def measure(config: EngineConfig, options: argparse.Namespace, bar: Progress, label: str) -> list[Round]:
    engine = AsyncEngine(config)
    task = bar.add_task(label, total=options.rounds + 1)
    await engine.start()
    try:
        rng = random.Random(1)
        rounds = []
        for i in range(options.rounds + 1):  # the first warms up
            rounds.append(await one_round(engine, options.streams, options.prompt, rng, f"round-{i}"))
            bar.advance(task)
        return rounds[1:]
    finally:
        await engine.close()


def summary(rounds: list[Round]) -> dict[str, float]:
    """Medians over the rounds, in seconds; ratios are taken within a round."""

    def high(gaps: list[float]) -> float:
        return statistics.quantiles(gaps, n=100)[98]

    return {
        "before_p50": statistics.median(statistics.median(r.before) for r in rounds),
        "during_p50": statistics.median(statistics.median(r.during) for r in rounds),
        "before_p99": statistics.median(high(r.before) for r in rounds),
        "during_p99": statistics.median(high(r.during) for r in rounds),
        "ratio_p50": statistics.median(statistics.median(r.during) / statistics.median(r.before) for r in rounds),
        "first_token": statistics.median(r.first_token for r in rounds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, help="a model's directory (default: the 1.1B shape, random weights)")
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("engine", nargs="*", help="flags of the engine, after --")
    options = parser.parse_args()
    model = options.model or models.make("1.1b")
    config = from_args(["--model-name=model", f"--model-uri={model.resolve()}", *options.engine])
    engines = {
        f"at most {config.max_itl_ratio:g}×": config,
        "no limit": msgspec.structs.replace(config, max_itl_ratio=0),
    }
    with Progress(console=Console(stderr=True), transient=True) as bar:
        rows = {label: summary(asyncio.run(measure(c, options, bar, label))) for label, c in engines.items()}
    print_table(rows, options)
    if options.json:
        result = {"model": model.name, "streams": options.streams, "prompt": options.prompt, "engine": options.engine}
        options.json.write_text(json.dumps(result | {"rows": rows}, indent=1) + "\n")


def print_table(rows: dict[str, dict[str, float]], options: argparse.Namespace) -> None:
    table = Table(
        title=f"{options.streams} streams, then a prompt of {options.prompt} tokens; milliseconds between tokens"
    )
    for heading in ("pacing", "before: median", "p99", "during: median", "p99", "during / before", "first token, s"):
        table.add_column(heading, justify="left" if heading == "pacing" else "right")
    for label, row in rows.items():
        gaps = (row[k] * 1e3 for k in ("before_p50", "before_p99", "during_p50", "during_p99"))
        table.add_row(label, *(f"{gap:.1f}" for gap in gaps), f"{row['ratio_p50']:.2f}×", f"{row['first_token']:.2f}")
    Console().print(table)


if __name__ == "__main__":
    main()
