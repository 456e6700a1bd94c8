"""What the books for resuming cost while nothing fails: a router that keeps them and does not, by turns.

    python -m benchmarks.resume_cost [--rounds N] [--json FILE]

One process, which a signal tells to replace `Ledger.take` by a function that does nothing, or to take it back: two
processes differ by some percents already. A round is the same streams with the books and without, in alternating order,
well under a second each, and gives a ratio of throughput and one of the router's CPU time. Mock workers send tokens as
fast as they are taken, so that the router is all that counts; the real engine (the sample model, the smallest there is)
shows what is left of that where tokens are computed.

`Ledger.take` is also timed by itself, the best of many tries less that of the function that does nothing: this over the
router's time for a token is the share that the books have.
"""

import argparse
import asyncio
import json
import os
import platform
import signal
import statistics
import sys
import time
import timeit
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tests.router.harness import MODEL, Process, eventually, mock_worker, running, worker

from wherry_protocol.worker import Event, ExecuteRequest, Prompt, Started, Token
from wherry_router.__main__ import main as router
from wherry_router.ledger import Ledger

STREAMS, AT_ONCE, TOKENS = 32, 32, 256
WORKERS: dict[str, Callable[[ExitStack], list[str]]] = {
    "mock": lambda stack: [stack.enter_context(mock_worker(name)).url for name in "ab"],
    "engine": lambda stack: [stack.enter_context(worker("--dtype", "bfloat16")).url],
}
WARM_UP = 4
SIGNALS = {"books": signal.SIGUSR1, "none": signal.SIGUSR2}
KEYS = {"tokens_per_s": "tokens/s", "cpu_us_per_token": "router CPU, µs a token"}


def nothing(_: Ledger, event: Event) -> Event:
    """In place of `Ledger.take`."""
    return event


def books_alone() -> float:
    """Nanoseconds that the books take for a token."""
    events = [Token(index, [index], "word ") for index in range(TOKENS)]
    request = ExecuteRequest(id="r", model=MODEL, prompt=Prompt())

    def best(take: Callable[[Ledger, Event], Event | None]) -> float:
        def answer() -> None:
            ledger = Ledger(request)
            ledger.take(Started("r", prompt_tokens=8, cached_tokens=0, seed=1))
            for event in events:
                take(ledger, event)

        return min(timeit.repeat(answer, number=100, repeat=20)) / 100 / TOKENS

    return (best(Ledger.take) - best(nothing)) * 1e9


def serve(args: list[str]) -> None:
    """A router that takes signals."""
    take = Ledger.take
    for number, chosen in ((SIGNALS["books"], take), (SIGNALS["none"], nothing)):
        signal.signal(number, lambda *_, chosen=chosen: setattr(Ledger, "take", chosen))
    router(args)


def start(stack: ExitStack, urls: list[str]) -> Process:
    args = ["serve", "--endpoints", ",".join(urls), "--model", MODEL, "--port", "0"]
    process = stack.enter_context(running(Process("benchmarks.resume_cost", args)))
    eventually(lambda: any(len(line["routable"]) >= len(urls) for line in process.messages("replicas")))
    return process


def cpu_seconds(process: Process) -> float:
    """What all threads of the process have run so far."""
    threads = Path(f"/proc/{process.popen.pid}/task").glob("*/schedstat")
    return sum(int(thread.read_text().split()[0]) for thread in threads) / 1e9


async def streams(session: aiohttp.ClientSession, url: str) -> None:
    script = json.dumps({"tokens": TOKENS, "text": "word "})  # which a mock worker follows, and an engine continues
    messages = [{"role": "user", "content": script}]
    options = {"stream": True, "max_tokens": TOKENS, "ignore_eos": True, "temperature": 0}
    body = json.dumps({"model": MODEL, "messages": messages, **options}).encode()
    gate = asyncio.Semaphore(AT_ONCE)

    async def one() -> None:
        async with gate, session.post(url + "/v1/chat/completions", data=body) as response:
            last = b""
            async for chunk in response.content.iter_any():
                last = chunk
            if not last.endswith(b"data: [DONE]\n\n"):
                raise RuntimeError(f"{response.status}: {last[-200:]!r}")

    await asyncio.gather(*(one() for _ in range(STREAMS)))


async def turn(session: aiohttp.ClientSession, process: Process, kind: str) -> dict[str, float]:
    process.signal(SIGNALS[kind])
    cpu, began = cpu_seconds(process), time.perf_counter()
    await streams(session, process.url)
    seconds, tokens = time.perf_counter() - began, STREAMS * TOKENS
    return {"tokens_per_s": tokens / seconds, "cpu_us_per_token": (cpu_seconds(process) - cpu) / tokens * 1e6}


async def measure(process: Process, rounds: int) -> dict[str, list[dict[str, float]]]:
    results: dict[str, list[dict[str, float]]] = {kind: [] for kind in SIGNALS}
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers={"content-type": "application/json"}) as session:
        for number in track(range(rounds + WARM_UP), "rounds", transient=True):
            for kind in sorted(SIGNALS, reverse=bool(number % 2)):
                result = await turn(session, process, kind)
                if number >= WARM_UP:
                    results[kind].append(result)
    return results


def ratio(results: dict[str, list[dict[str, float]]], key: str) -> dict[str, float]:
    """With books over without, round by round: the median and its standard error."""
    pairs = [on[key] / off[key] for on, off in zip(results["books"], results["none"], strict=True)]
    error = 1.2533 * statistics.stdev(pairs) / len(pairs) ** 0.5  # of a median, of values that scatter normally
    return {"median": statistics.median(pairs), "standard_error": error, "rounds": len(pairs)}


def show(name: str, summary: dict[str, Any]) -> None:
    table = Table(
        "", "without books", "with books", "ratio", title=f"{name}: {AT_ONCE} streams at once of {TOKENS} tokens"
    )
    for key, text in KEYS.items():
        row = summary[key]
        table.add_row(
            text,
            f"{row['none']:.1f}",
            f"{row['books']:.1f}",
            f"{row['ratio']['median']:.3f} ± {row['ratio']['standard_error']:.3f}",
        )
    Console().print(table)


def compare(name: str, rounds: int) -> dict[str, Any]:
    """In front of one kind of workers."""
    with ExitStack() as stack:
        urls = WORKERS[name](stack)
        results = asyncio.run(measure(start(stack, urls), rounds))
    return {
        key: {name: statistics.median(r[key] for r in rows) for name, rows in results.items()}
        | {"ratio": ratio(results, key)}
        for key in KEYS
    }


def main() -> None:
    if sys.argv[1:2] == ["serve"]:
        serve(sys.argv[2:])
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--workers", nargs="+", choices=WORKERS, default=list(WORKERS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/resume_cost.json"))
    args = parser.parse_args()
    summary: dict[str, Any] = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}
    }
    alone = summary["books_ns_per_token"] = books_alone()
    for name in args.workers:
        summary[name] = compare(name, args.rounds)
        show(name, summary[name])
        share = alone / 1000 / summary[name]["cpu_us_per_token"]["books"]
        Console().print(f"the books alone: {alone:.0f} ns a token, {share:.2%} of the router's CPU")
    args.json.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
