"""What the prefix cache saves: time to first token with and without it, on workloads that repeat themselves.

    python -m benchmarks.prefix_cache [--model DIR] [--json FILE]

* multi-turn chat: conversations whose every turn sends the whole history again;
* shared system prompt: questions that have one long beginning in common;
* one changed token: a long prompt that was answered before, asked again with another last token.

Prompts are token ids; each workload runs on an engine of its own with the cache and on one without, same requests.
"""

import argparse
import asyncio
import json
import random
import statistics
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

from rich.console import Console
from rich.progress import Progress as Bar
from rich.table import Table

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.worker import End, ExecuteRequest, Prompt, SamplingParams, Token
from wherry_runtime.engine.async_engine import AsyncEngine

TINY = Path(__file__).resolve().parents[1] / "examples" / "models" / "tiny"
VOCABULARY = 4000  # ids below this are ordinary tokens in every model here
CONVERSATIONS, TURNS, QUESTION, ANSWER = 4, 6, 60, 40
SYSTEM, QUESTIONS = 1000, 16
LONG, CHANGES = 2000, 8

Workload = Callable[["Client", random.Random], Awaitable[dict[str, list[float]]]]


class Client:
    """Asks an engine and takes the time."""

    def __init__(self, engine: AsyncEngine, bar: Bar) -> None:
        self._engine = engine
        self._bar = bar
        self._task = bar.add_task("requests", total=None)
        self._asked = 0

    async def ask(self, tokens: list[int], new: int) -> tuple[float, list[int]]:
        """Seconds to the first token, and the answer."""
        self._asked += 1
        request = ExecuteRequest(
            id=f"request-{self._asked}",
            model="model",
            prompt=Prompt(token_ids=tokens),
            sampling=SamplingParams(max_tokens=new, temperature=0, ignore_eos=True),
        )
        began = time.perf_counter()
        first: float | None = None
        answer: list[int] = []
        async for event in self._engine.generate(request):
            if isinstance(event, Token):
                first = first or time.perf_counter() - began
                answer += event.ids
            elif isinstance(event, End):
                self._bar.advance(self._task)
        if first is None or len(answer) != new:
            raise RuntimeError("the engine failed during an answer; its log says why")
        return first, answer


def some_tokens(rng: random.Random, count: int) -> list[int]:
    return [rng.randrange(10, VOCABULARY) for _ in range(count)]


async def chat(client: Client, rng: random.Random) -> dict[str, list[float]]:
    """Conversations side by side, turn by turn."""
    histories = [some_tokens(rng, QUESTION) for _ in range(CONVERSATIONS)]
    seconds: dict[str, list[float]] = {}
    for turn in range(TURNS):
        times = seconds[f"chat, turn {turn + 1} of {len(histories[0])}"] = []
        for history in histories:
            first, answer = await client.ask(history, ANSWER)
            times.append(first)
            history += answer + some_tokens(rng, QUESTION)
    return seconds


async def system_prompt(client: Client, rng: random.Random) -> dict[str, list[float]]:
    """One beginning, many questions."""
    system = some_tokens(rng, SYSTEM)
    times = [(await client.ask(system + some_tokens(rng, 30), 8))[0] for _ in range(QUESTIONS)]
    return {f"system prompt of {SYSTEM}, first question": times[:1], "  every other question": times[1:]}


async def changed_token(client: Client, rng: random.Random) -> dict[str, list[float]]:
    """The same prompt but for its last token."""
    prompt = some_tokens(rng, LONG)
    times = []
    for _ in range(CHANGES):
        prompt[-1] = rng.randrange(10, VOCABULARY)
        times.append((await client.ask(prompt, 1))[0])
    return {f"prompt of {LONG}, first time": times[:1], "  with its last token changed": times[1:]}


async def measure(model: Path, workload: Workload, prefix_cache: bool, bar: Bar) -> tuple[dict[str, float], float]:
    """Median seconds to the first token by kind of request, and the cache's hit rate."""
    engine = AsyncEngine(EngineConfig(model_name="model", model_uri=str(model), prefix_cache=prefix_cache))
    await engine.start()
    try:
        client = Client(engine, bar)
        await client.ask(some_tokens(random.Random(0), 300), 4)  # warms up the process, not the cache
        seconds = await workload(client, random.Random(1))
        load = engine.load()
        return (
            {kind: statistics.median(times) for kind, times in seconds.items()},
            load.prefix_hit_tokens_total / load.prefix_queried_tokens_total,
        )
    finally:
        await engine.close()


async def run(model: Path) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    with Bar(console=Console(stderr=True), transient=True) as bar:
        for workload in (chat, system_prompt, changed_token):
            cold, _ = await measure(model, workload, False, bar)
            warm, hit_rate = await measure(model, workload, True, bar)
            rows += [
                {"kind": kind, "without_s": cold[kind], "with_s": warm[kind], "hit_rate": hit_rate} for kind in cold
            ]
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TINY, help="a model's directory (default: the sample model)")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = asyncio.run(run(options.model))
    table = Table(title="Median time to first token; hit rate of the whole workload")
    for heading in ("request", "no cache", "cache", "faster", "hit rate"):
        table.add_column(heading, justify="left" if heading == "request" else "right")
    for row in rows:
        without, with_cache = float(row["without_s"]), float(row["with_s"])
        table.add_row(
            str(row["kind"]),
            f"{without * 1e3:.1f} ms",
            f"{with_cache * 1e3:.1f} ms",
            f"{without / with_cache:.1f}×",
            f"{float(row['hit_rate']):.0%}",
        )
    Console().print(table)
    if options.json:
        options.json.write_text(json.dumps({"model": options.model.name, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
