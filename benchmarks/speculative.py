"""What speculative decoding brings: tokens per second with it against without, in one run.

    python -m benchmarks.speculative [--model examples/models/tiny] [--draft examples/models/draft] [--dtype bfloat16]
        [--batch 1 4 8 16] [--mode ngram draft auto] [--temperature 0 0.8] [--new-tokens 192] [--json out.json]

One engine without speculation and one for each mode are loaded side by side and take turns, round after round, so that
whatever else the machine does hits them alike; a ratio is the median over rounds of two neighbouring runs. The first
rounds, in which a mode learns what pays here, are not counted (`--warm`). Answers are checked to be the same tokens.

`asleep` is the share of steps that speculation did not look at, because it does not pay; `upkeep` the share of time
that it takes besides guessing, measured in a round of its own. `control` is a second engine without speculation: its
distance from 1 is what chance does here. After ± is the standard error of a ratio.
"""

import argparse
import asyncio
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.worker import ChatMessage, ExecuteRequest, Prompt, SamplingParams, Token
from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.engine.speculative.speculator import Speculator

CHECKOUT = Path(__file__).resolve().parents[1]
PROMPT_CHARACTERS = 600
MEDIAN_ERROR = math.sqrt(math.pi / 2)  # of a median, for 1 of a mean
QUESTIONS = [
    "How do I read a file line by line in Python?",
    "What does the git rebase command do?",
    "Explain what a kernel module is.",
    "How do I create an index in PostgreSQL?",
    "Which package holds the documentation of Debian?",
    "How is a class method defined?",
    "What is the difference between a process and a thread?",
    "How do I undo the last commit?",
]


@dataclass
class Result:
    """One mode on one kind of text at one batch size."""

    text: str
    temperature: float
    batch: int
    mode: str
    tokens_per_s: float
    ratio: float  # to no speculation, in the same round
    error: float  # standard error of it
    acceptance: float  # of the tokens guessed
    depth: float  # mean guesses of a run, over all steps of all sequences: 0 where it is off
    asleep: float  # of all steps
    upkeep: float  # of all time, besides guessing
    same: bool  # tokens equal to those without speculation


def prompts(text: str, batch: int) -> list[Prompt]:
    """Prompts of one kind, all different."""
    if text == "chat":
        return [
            Prompt(messages=[ChatMessage(role="user", content=QUESTIONS[i % len(QUESTIONS)] + " " * (i // 8))])
            for i in range(batch)
        ]
    if text == "repetitive":
        rows = [f"| row {i} | name_{i} | {'yes' if i % 2 else 'no'} | /srv/data/part-{i}.txt |" for i in range(40)]
        return [Prompt(text="\n".join(rows[i : i + 12]) + "\n") for i in range(batch)]
    files = (
        sorted((CHECKOUT / "docs").glob("*.md"))
        if text == "documentation"
        else sorted((CHECKOUT / "runtime" / "wherry_router").rglob("*.py"))
    )
    content = "\n".join(path.read_text() for path in files)
    starts = [i * (len(content) - PROMPT_CHARACTERS) // batch for i in range(batch)]
    return [Prompt(text=content[start : start + PROMPT_CHARACTERS]) for start in starts]


async def answers(engine: AsyncEngine, asked: list[Prompt], params: SamplingParams) -> tuple[float, list[list[int]]]:
    """Seconds for all answers at once, and their tokens."""

    async def one(index: int, prompt: Prompt) -> list[int]:
        request = ExecuteRequest(id=f"r{index}", model="m", prompt=prompt, sampling=params)
        return [i async for e in engine.generate(request) if isinstance(e, Token) for i in e.ids]

    began = time.perf_counter()
    tokens = await asyncio.gather(*(one(i, p) for i, p in enumerate(asked)))
    return time.perf_counter() - began, list(tokens)


def speculator_of(engine: AsyncEngine) -> Speculator | None:
    return engine._core.speculator if engine._core is not None else None


@dataclass
class Tally:
    """What an engine had counted at some point."""

    drafted: int = 0
    accepted: int = 0
    steps: int = 0
    slept: int = 0

    @classmethod
    def of(cls, engine: AsyncEngine) -> "Tally":
        core, speculator = engine._core, speculator_of(engine)
        if core is None or speculator is None:
            return cls()
        return cls(speculator.counts.drafted, speculator.counts.accepted, core.steps, speculator.governor.slept)


@contextmanager
def timed_upkeep(speculator: Speculator) -> Iterator[list[float]]:
    """Seconds of each call that a step makes besides those that guess."""
    spent: list[float] = []

    def timed(call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any) -> Any:
            began = time.perf_counter()
            result = call(*args)
            spent.append(time.perf_counter() - began)
            return result

        return run

    names = ("dozes", "next_mode", "observe", "forget")
    for name in names:
        setattr(speculator, name, timed(getattr(speculator, name)))
    try:
        yield spent
    finally:
        for name in names:
            delattr(speculator, name)


async def upkeep(engine: AsyncEngine, asked: list[Prompt], params: SamplingParams) -> float:
    """Share of the time of all answers at once that speculation takes besides guessing."""
    speculator = speculator_of(engine)
    if speculator is None:
        return 0.0
    with timed_upkeep(speculator) as spent:
        seconds, _ = await answers(engine, asked, params)
    return sum(spent) / seconds


async def measure(
    engines: dict[str, AsyncEngine],
    text: str,
    batch: int,
    temperature: float,
    args: argparse.Namespace,
    progress: Progress,
) -> list[Result]:
    """All modes in turns."""
    asked = prompts(text, batch)
    params = SamplingParams(max_tokens=args.new_tokens, temperature=temperature, seed=1, ignore_eos=True)
    rates: dict[str, list[float]] = {mode: [] for mode in engines}
    right: list[list[int]] = []
    same = dict.fromkeys(engines, True)
    before: dict[str, Tally] = {}
    task = progress.add_task(f"{text}, temperature {temperature:g}, batch {batch}", total=args.warm + args.rounds)
    for number in range(args.warm + args.rounds):
        if number == args.warm:
            before = {mode: Tally.of(engine) for mode, engine in engines.items()}
        order = list(engines.items()) if number % 2 else list(engines.items())[::-1]
        outcome = {}
        for mode, engine in order:
            seconds, tokens = await answers(engine, asked, params)
            outcome[mode] = tokens
            if number >= args.warm:
                rates[mode].append(sum(map(len, tokens)) / seconds)
        right = outcome["none"]
        for mode, tokens in outcome.items():
            same[mode] = same[mode] and tokens == right
        progress.advance(task)
    progress.remove_task(task)
    after = {mode: Tally.of(engine) for mode, engine in engines.items()}
    results = []
    produced = args.rounds * batch * args.new_tokens
    for mode, engine in engines.items():
        then, now = before[mode], after[mode]
        drafted, accepted = now.drafted - then.drafted, now.accepted - then.accepted
        ratios = [a / b for a, b in zip(rates[mode], rates["none"], strict=True)]
        results.append(
            Result(
                text,
                temperature,
                batch,
                mode,
                statistics.median(rates[mode]),
                statistics.median(ratios),
                MEDIAN_ERROR * statistics.stdev(ratios) / math.sqrt(len(ratios)) if len(ratios) > 1 else 0.0,
                accepted / drafted if drafted else 0.0,
                drafted / (produced - accepted),  # a step of a sequence gives one token besides those accepted
                (now.slept - then.slept) / max(now.steps - then.steps, 1),
                await upkeep(engine, asked, params),
                same[mode],
            )
        )
    return results


async def run(args: argparse.Namespace, progress: Progress) -> list[Result]:
    engines: dict[str, AsyncEngine] = {}
    try:
        for mode in ["none", "control", *args.mode]:
            engines[mode] = AsyncEngine(
                EngineConfig(
                    model_name="m",
                    model_uri=str(args.model),
                    dtype=args.dtype,
                    quantization=args.quantization,
                    backend=args.backend,
                    max_running=max(args.batch),
                    kv_cache_bytes=args.kv_cache_bytes,
                    prefix_cache=False,
                    threads=args.threads,
                    speculative="none" if mode == "control" else mode,
                    draft_model_uri=str(args.draft) if mode in ("draft", "auto") else "",
                    max_draft_tokens=args.max_draft_tokens,
                )
            )
            await engines[mode].start()
        results = []
        for temperature in args.temperature:
            for text in args.text:
                for batch in args.batch:
                    results += await measure(engines, text, batch, temperature, args, progress)
        return results
    finally:
        for engine in engines.values():
            await engine.close()


def show(results: list[Result], console: Console) -> None:
    """Ratios as a table, and the figures that are held against goals."""
    columns = ("text", "temperature", "batch", "off, tok/s", "mode", "ratio", "accepted", "depth", "asleep", "upkeep")
    table = Table(*columns, "same tokens")
    off = {(r.text, r.temperature, r.batch): r.tokens_per_s for r in results if r.mode == "none"}
    for r in results:
        if r.mode != "none":
            rate = off[r.text, r.temperature, r.batch]
            table.add_row(
                *(r.text, f"{r.temperature:g}", str(r.batch), f"{rate:.0f}", r.mode, f"{r.ratio:.2f} ± {r.error:.2f}"),
                *(f"{r.acceptance:.0%}", f"{r.depth:.1f}", f"{r.asleep:.0%}", f"{r.upkeep:.1%}"),
                "yes" if r.same else "no",
            )
    console.print(table)
    for mode in dict.fromkeys(r.mode for r in results if r.mode != "none"):
        own = [r for r in results if r.mode == mode]
        single = [r.ratio for r in own if r.batch == 1]
        first = f"batch 1: {statistics.geometric_mean(single):.2f}× (geometric mean), " if single else ""
        lowest = min(own, key=lambda r: r.ratio)
        console.print(f"{mode}: {first}lowest {lowest.ratio:.2f}× ({lowest.text}, batch {lowest.batch})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=CHECKOUT / "examples/models/tiny")
    parser.add_argument("--draft", type=Path, default=CHECKOUT / "examples/models/draft")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--mode", nargs="+", default=["ngram", "draft", "auto"])
    parser.add_argument("--text", nargs="+", default=["chat", "documentation", "code", "repetitive"])
    parser.add_argument("--temperature", type=float, nargs="+", default=[0.0, 0.8])
    parser.add_argument("--new-tokens", type=int, default=192)
    parser.add_argument("--max-draft-tokens", type=int, default=8)
    parser.add_argument("--kv-cache-bytes", type=int, default=256 << 20)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--warm", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console(width=120)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        results = asyncio.run(run(args, progress))
    show(results, console)
    if args.json:
        args.json.write_text(json.dumps([asdict(r) for r in results], indent=1) + "\n")


if __name__ == "__main__":
    main()
