"""What the router adds: the same requests to a mock worker, directly and through the router, in turns in one run.

    python -m benchmarks.router_overhead [--requests N] [--json FILE]

The direct requests speak the worker API, the routed ones the OpenAI API, so the difference holds all that the router
does: validation, choice of a replica, translation of both sides, and one more hop.
"""

import argparse
import asyncio
import json
import os
import platform
import statistics
import time
from pathlib import Path
from typing import Any

import aiohttp
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tests.router.harness import MODEL, mock_worker, router

TOKENS = 32


def chat_body(script: str, *, stream: bool) -> bytes:
    return json.dumps({"model": MODEL, "messages": [{"role": "user", "content": script}], "stream": stream}).encode()


def worker_body(script: str) -> bytes:
    return json.dumps({"id": os.urandom(8).hex(), "model": MODEL, "prompt": {"text": script}}).encode()


async def timed(session: aiohttp.ClientSession, url: str, body: bytes) -> float:
    """Seconds from the request to the last byte."""
    began = time.perf_counter()
    async with session.post(url, data=body) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        async for _ in response.content.iter_any():
            pass
    return time.perf_counter() - began


async def first_byte(session: aiohttp.ClientSession, url: str, body: bytes) -> float:
    """Seconds from the request to the first byte of the body."""
    began = time.perf_counter()
    async with session.post(url, data=body) as response:
        await response.content.readany()
        took = time.perf_counter() - began
        async for _ in response.content.iter_any():
            pass
    return took


def summary(seconds: list[float]) -> dict[str, float]:
    cuts = statistics.quantiles(seconds, n=100)
    return {"p50_ms": cuts[49] * 1e3, "p99_ms": cuts[98] * 1e3, "requests": len(seconds)}


async def sequential(session: aiohttp.ClientSession, direct: str, routed: str, count: int) -> dict[str, Any]:
    one = json.dumps({"tokens": 1, "text": "word "})
    times: dict[str, list[float]] = {
        "direct": [],
        "router": [],
        "router, streamed": [],
        "direct, ttft": [],
        "router, ttft": [],
    }
    for number in track(range(count + 50), "sequential", transient=True):
        taken = {
            "direct": await timed(session, direct, worker_body(one)),
            "router": await timed(session, routed, chat_body(one, stream=False)),
            "router, streamed": await timed(session, routed, chat_body(one, stream=True)),
            "direct, ttft": await first_byte(session, direct, worker_body(one)),
            "router, ttft": await first_byte(session, routed, chat_body(one, stream=True)),
        }
        if number >= 50:  # the first ones warm up
            for name, seconds in taken.items():
                times[name].append(seconds)
    return {name: summary(seconds) for name, seconds in times.items()}


async def throughput(session: aiohttp.ClientSession, url: str, body: Any, count: int, at_once: int) -> dict[str, float]:
    gate = asyncio.Semaphore(at_once)

    async def one() -> None:
        async with gate:
            await timed(session, url, body())

    began = time.perf_counter()
    await asyncio.gather(*(one() for _ in range(count)))
    seconds = time.perf_counter() - began
    return {"requests_per_s": count / seconds, "tokens_per_s": count * TOKENS / seconds, "at_once": at_once}


async def measure(worker_url: str, router_url: str, count: int) -> dict[str, Any]:
    direct, routed = worker_url + "/execute", router_url + "/v1/chat/completions"
    many = json.dumps({"tokens": TOKENS, "text": "word "})
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, headers={"content-type": "application/json"}) as session:
        latency = await sequential(session, direct, routed, count)
        streams = {}
        for at_once in (1, 32):
            streams[f"direct, {at_once} at once"] = await throughput(
                session, direct, lambda: worker_body(many), count, at_once
            )
            streams[f"router, {at_once} at once"] = await throughput(
                session, routed, lambda: chat_body(many, stream=True), count, at_once
            )
    return {"latency": latency, "streams": streams}


def show(result: dict[str, Any]) -> None:
    console = Console()
    latency = Table("one request at a time, one token", "p50 ms", "p99 ms", title="Latency")
    for name, row in result["latency"].items():
        latency.add_row(name, f"{row['p50_ms']:.2f}", f"{row['p99_ms']:.2f}")
    for name, base in (("router", "direct"), ("router, ttft", "direct, ttft")):
        added = [result["latency"][name][key] - result["latency"][base][key] for key in ("p50_ms", "p99_ms")]
        latency.add_row(f"added ({name})", f"{added[0]:.2f}", f"{added[1]:.2f}")
    console.print(latency)
    streams = Table(f"streams of {TOKENS} tokens", "requests/s", "tokens/s", title="Throughput")
    for name, row in result["streams"].items():
        streams.add_row(name, f"{row['requests_per_s']:.0f}", f"{row['tokens_per_s']:.0f}")
    console.print(streams)
    console.print(f"router memory (RSS): {result['router_rss_mb']:.0f} MB")


def rss_mb(pid: int) -> float:
    status = Path(f"/proc/{pid}/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/router_overhead.json"))
    args = parser.parse_args()
    with mock_worker("a") as mock, router(mock.url) as front:
        result = asyncio.run(measure(mock.url, front.url, args.requests))
        result["router_rss_mb"] = rss_mb(front.popen.pid)
    result["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}
    show(result)
    args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
