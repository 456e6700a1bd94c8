"""Overload: what waits, who is served and who is refused, in front of simulated replicas.

    python -m benchmarks.router.overload [--seconds N] [--json FILE]

First the capacity is measured, with more clients at a time than there are slots. Then requests come as a Poisson
process at 90% and at 150% of it, in three classes, and in the end two tenants with one weight, one of which sends ten
times as much. About two and a half minutes.
"""

import argparse
import asyncio
import json
import os
import platform
import random
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from rich.console import Console
from rich.table import Table
from tests.router.harness import MODEL, Process, router, running

CLASSES = {"high": 0.2, "mid": 0.4, "low": 0.4}  # share of the requests
PRIORITIES = {"high": 10, "mid": 0, "low": -10}
KEYS = {"small": "wk-small-0123456789abcdef", "greedy": "wk-greedy-0123456789abcdef"}
SLO_S = 1.0  # from the request to its first token, for the high class
QUEUE_TIMEOUT_S = 10
PROMPT_BYTES = 400
WARM_UP_S = 5.0


@dataclass
class Seen:
    """One request. Times in seconds since the run began."""

    kind: str
    came: float
    first: float = 0.0
    ended: float = 0.0
    tokens: int = 0
    status: int = 0


@dataclass
class Run:
    """All requests of one run, and how many waited at each look."""

    seconds: float
    seen: list[Seen] = field(default_factory=list)
    queued: list[int] = field(default_factory=list)
    waits: dict[str, float] = field(default_factory=dict)  # by class: 99% waited no longer, by the router's buckets

    def counted(self, kind: str | None = None) -> list[Seen]:
        """Those that came after the first seconds."""
        return [s for s in self.seen if s.came >= WARM_UP_S and kind in (None, s.kind)]

    def tokens_per_s(self, kind: str | None = None) -> float:
        """Of answers that ended within the run."""
        ended = [s for s in self.seen if s.status == 200 and WARM_UP_S <= s.ended <= self.seconds]
        return sum(s.tokens for s in ended if kind in (None, s.kind)) / (self.seconds - WARM_UP_S)


def keys_file(directory: Path) -> Path:
    """Two tenants with one weight."""
    path = directory / "keys.json"
    path.write_text(json.dumps({"keys": [{"name": n, "key": k, "priorityClass": "high"} for n, k in KEYS.items()]}))
    return path


@contextmanager
def front(replicas: int, max_running: int) -> Iterator[Process]:
    """A router with three classes and two tenants over simulated replicas of a slow device."""

    def urls(process: Process) -> str:
        lines = [json.loads(line) for line in process.log().splitlines() if line.startswith('{"replica"')]
        return ",".join(line["url"] for line in lines) if len(lines) == replicas else ""

    shape = ["--replicas", str(replicas), "--max-running", str(max_running), "--port", "0"]
    costs = ["--step-ms", "10", "--decode-ms", "0.5", "--prefill-ms", "0.2", "--tokens-per-event", "8"]
    with TemporaryDirectory() as directory, running(Process("wherry_cli.simulate", [*shape, *costs]), urls) as workers:
        args = [f"--priority-class=name={n},priority={p}" for n, p in PRIORITIES.items()]
        args[1] += ",default"
        args += ["--queue-timeout-s", str(QUEUE_TIMEOUT_S), "--api-keys", str(keys_file(Path(directory)))]
        with router(*workers.url.split(","), args=tuple(args)) as process:
            yield process


def body(luck: random.Random, tokens: int) -> bytes:
    text = "".join(luck.choices("abcdefgh ", k=PROMPT_BYTES))
    request = {"model": MODEL, "messages": [{"role": "user", "content": text}], "max_tokens": tokens}
    return json.dumps(request | {"ignore_eos": True, "stream": True}).encode()


async def ask(session: aiohttp.ClientSession, url: str, run: Run, seen: Seen, began: float, data: bytes) -> None:
    """One request, to its end."""
    key = KEYS.get(seen.kind, KEYS["small"])
    headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
    if seen.kind in CLASSES:
        headers["x-wherry-priority"] = seen.kind
    async with session.post(url + "/v1/chat/completions", data=data, headers=headers) as response:
        run.seen.append(seen)
        seen.status = response.status
        tail = b""
        async for piece in response.content.iter_any():
            seen.first = seen.first or time.perf_counter() - began
            tail = (tail + piece)[-100:]
        if seen.status == 200 and not tail.rstrip().endswith(b"[DONE]"):
            seen.status = 0
    seen.ended = time.perf_counter() - began


async def buckets(session: aiohttp.ClientSession, url: str) -> Counter[tuple[str, float]]:
    """How many requests had waited so long at most, by class and seconds."""
    async with session.get(url + "/metrics") as response:
        text = await response.text()
    found = re.findall(r'^wherry_router_queue_wait_seconds_bucket\{class="(\w+)",le="([^"]+)"\} (\S+)$', text, re.M)
    return Counter({(name, float(le)): int(float(count)) for name, le, count in found})


def waits(before: Counter[tuple[str, float]], after: Counter[tuple[str, float]]) -> dict[str, float]:
    """The smallest bound of a bucket that 99% of a class are within."""
    result = {}
    for name in {name for name, _ in after}:
        counts = {le: after[one, le] - before[one, le] for one, le in sorted(after) if one == name}
        result[name] = min(le for le, count in counts.items() if count >= 0.99 * counts[float("inf")])
    return result


async def watch(session: aiohttp.ClientSession, url: str, run: Run) -> None:
    """Notes how many wait, several times a second."""
    while True:
        async with session.get(url + "/metrics") as response:
            lines = (await response.text()).splitlines()
        run.queued.append(
            sum(int(float(x.split()[-1])) for x in lines if x.startswith("wherry_router_queued_requests{"))
        )
        await asyncio.sleep(0.25)


async def arrivals(front: Process, seconds: float, rates: dict[str, float], lengths: Sequence[int], seed: int) -> Run:
    """Requests of each kind at its rate, whatever happens to them."""
    luck, run = random.Random(seed), Run(seconds)
    total = sum(rates.values())
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session, asyncio.TaskGroup() as tasks:
        before = await buckets(session, front.url)
        watcher = tasks.create_task(watch(session, front.url, run))
        began = time.perf_counter()
        due, asked = 0.0, []
        while (due := due + luck.expovariate(total)) < seconds:
            await asyncio.sleep(max(began + due - time.perf_counter(), 0))
            kind = luck.choices(list(rates), list(rates.values()))[0]
            length = luck.choice(lengths)
            seen = Seen(kind, due, tokens=length)
            asked.append(tasks.create_task(ask(session, front.url, run, seen, began, body(luck, length))))
        await asyncio.gather(*asked)
        watcher.cancel()
        run.waits = waits(before, await buckets(session, front.url))
    return run


async def saturated(front: Process, seconds: float, at_once: int, length: int) -> Run:
    """So many clients at a time, each with its next request as soon as it has its answer."""
    luck, run = random.Random(0), Run(seconds)
    began = time.perf_counter()
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:

        async def client() -> None:
            while (now := time.perf_counter() - began) < seconds:
                await ask(session, front.url, run, Seen("mid", now, tokens=length), began, body(luck, length))

        await asyncio.gather(*(client() for _ in range(at_once)))
    return run


def quantile(values: list[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


def rows(run: Run, kinds: Sequence[str]) -> dict[str, dict[str, float]]:
    """What became of each kind of request."""
    result = {}
    for kind in kinds:
        counted = run.counted(kind)
        ttfts = [s.first - s.came for s in counted if s.status == 200]
        statuses = Counter(s.status for s in counted)
        result[kind] = {
            "requests": len(counted),
            "answered": statuses[200],
            "429": statuses[429],
            "504": statuses[504],
            "other": len(counted) - statuses[200] - statuses[429] - statuses[504],
            **({"wait p99 <=": run.waits[kind]} if kind in run.waits else {}),
            "TTFT p50": quantile(ttfts, 0.5),
            "TTFT p99": quantile(ttfts, 0.99),
            "tokens/s": round(run.tokens_per_s(kind)),
        }
    return result


def show(console: Console, title: str, result: dict[str, dict[str, float]]) -> None:
    table = Table("", *next(iter(result.values())), title=title)
    for kind, row in result.items():
        table.add_row(kind, *(f"{v:.2f}" if isinstance(v, float) else str(v) for v in row.values()))
    console.print(table)


async def classes(console: Console, seconds: float) -> dict[str, Any]:
    """Three classes at 90% and 150% of the capacity."""
    length = 32
    with front(9, 8) as process:
        full = await saturated(process, 15, 128, length)
        capacity = full.tokens_per_s()
        per_s = capacity / length
        console.print(f"capacity: {capacity:.0f} tokens/s, {per_s:.0f} requests/s")
        result: dict[str, Any] = {"capacity_tokens_per_s": capacity, "capacity_requests_per_s": per_s}
        for load in (0.9, 1.5):
            rates = {name: share * load * per_s for name, share in CLASSES.items()}
            run = await arrivals(process, seconds, rates, [length], seed=round(load * 10))
            found = rows(run, list(CLASSES))
            show(console, f"{load:.0%} of capacity, {load * per_s:.0f} requests/s", found)
            goodput = run.tokens_per_s() / capacity
            within = [s for s in run.counted("high") if s.status == 200 and s.first - s.came <= SLO_S]
            slo = len(within) / max(len(run.counted("high")), 1)
            console.print(f"queued at most {max(run.queued)}, goodput {goodput:.0%} of capacity")
            console.print(f"high class: {slo:.1%} within {SLO_S:g} s")
            result[f"{load:.0%}"] = {"classes": found, "queued_max": max(run.queued), "goodput": goodput, "slo": slo}
    return result


async def tenants(console: Console, seconds: float) -> dict[str, Any]:
    """Two tenants with one weight: one asks for four fifths of the capacity, the other for ten times that."""
    lengths = (8, 16, 32, 64)
    with front(2, 4) as process:
        full = await saturated(process, 10, 24, sum(lengths) // len(lengths))
        per_s = full.tokens_per_s() / (sum(lengths) / len(lengths))
        rates = {"small": 0.8 * per_s, "greedy": 8 * per_s}
        run = await arrivals(process, seconds, rates, lengths, seed=3)
    found = rows(run, list(KEYS))
    # Prompts cost tokens too: about a hundred, and the same for both.
    ended = [s for s in run.seen if s.status == 200 and WARM_UP_S <= s.ended <= seconds]
    spent = {kind: sum(s.tokens + PROMPT_BYTES / 4 for s in ended if s.kind == kind) for kind in KEYS}
    share = spent["small"] / sum(spent.values())
    show(console, f"two tenants, {rates['small']:.0f} and {rates['greedy']:.0f} requests/s", found)
    console.print(f"the small one's share of the tokens: {share:.1%}")
    return {"tenants": found, "share": share}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=30, help="of each run (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/router/results/overload.json"))
    args = parser.parse_args()
    # Told to stop, it ends what it started, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    console = Console()
    result = {
        "machine": {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.system()},
        "overload": asyncio.run(classes(console, args.seconds)),
        "fairness": asyncio.run(tenants(console, args.seconds)),
    }
    args.json.parent.mkdir(exist_ok=True)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
