"""Two thousand streams at a time through one router, for long: is any lost, and does memory grow?

    python -m benchmarks.router.soak [--minutes N] [--streams N] [--routers NAME…] [--json FILE] [--markdown]

Streams end and begin all the time. One in twenty clients leaves midway, and one in ten takes a new connection. The
slope is that of a line through the router's memory in the second half of the time, when all has been used once.
"""

import asyncio
import contextlib
import random
import resource
import time
from collections import Counter
from pathlib import Path
from typing import Any

import uvloop
from benchmarks.router.report import options, prepare, save, show
from benchmarks.router.routers import Running, mocks, router, workspace
from benchmarks.router.wire import Connection, Lost, chat, connect
from rich.progress import track

REPLICAS = 8
INTERVAL_S = 0.8  # between the tokens of a stream
SHORTEST, LONGEST = 10, 40  # tokens
SAMPLES_S = 2.0
LEAVES, RECONNECTS = 0.05, 0.1


async def client(url: str, until: float, rng: random.Random, counts: Counter[str]) -> None:
    """One stream after the other. What is over by itself and not whole counts as lost."""
    connection: Connection | None = None
    await asyncio.sleep(rng.random() * INTERVAL_S * SHORTEST)
    while time.monotonic() < until:
        tokens = rng.randint(SHORTEST, LONGEST)
        try:
            if connection is None or not connection.open:
                connection = await connect(url)
            counts["running"] += 1
            counts["most"] = max(counts["most"], counts["running"])
            try:
                patience = rng.random() * tokens * INTERVAL_S if rng.random() < LEAVES else None
                answer = await asyncio.wait_for(connection.ask(chat(tokens, stream=True)), patience)
            finally:
                counts["running"] -= 1
        except TimeoutError:
            counts["left"] += 1
            if connection is not None:
                connection.close()
            continue
        except Lost:
            counts["lost"] += 1
            continue
        if answer.status == 200 and answer.done and answer.pieces == tokens:
            counts["complete"] += 1
            counts["tokens"] += tokens
        else:
            counts["lost" if answer.status == 200 else "refused"] += 1
        if rng.random() < RECONNECTS:
            connection.close()
    if connection is not None:
        connection.close()


async def churn(running: Running, streams: int, seconds: float) -> tuple[Counter[str], list[tuple[float, float]]]:
    """The counts, and (seconds, MB) of the router's memory."""
    counts: Counter[str] = Counter()
    began = time.monotonic()
    clients = [
        asyncio.create_task(client(running.url, began + seconds, random.Random(number), counts))
        for number in range(streams)
    ]
    memory = []
    for _ in track(range(max(int(seconds / SAMPLES_S), 2)), f"{streams} streams", transient=True):
        await asyncio.sleep(SAMPLES_S)
        memory.append((time.monotonic() - began, running.rss_mb()))
    await asyncio.gather(*clients)
    return counts, memory


def slope(points: list[tuple[float, float]]) -> float:
    """MB an hour of the line through (seconds, MB) with the least squares."""
    mean_x, mean_y = (sum(axis) / len(points) for axis in zip(*points, strict=True))
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return 3600 * sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def measure(name: str, args: Any, folder: Path) -> dict[str, Any]:
    """One router's row."""
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(mocks(folder, REPLICAS, INTERVAL_S))
        running = stack.enter_context(router(name, workers, folder))
        cpu, before = running.cpu_s(), running.rss_mb()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            counts, memory = runner.run(churn(running, args.streams, args.minutes * 60))
        cpu = running.cpu_s() - cpu
    seconds = memory[-1][0]
    return {
        "most_at_once": counts["most"],
        "complete": counts["complete"],
        "lost": counts["lost"],
        "refused": counts["refused"],
        "left": counts["left"],
        "tokens_per_s": round(counts["tokens"] / seconds),
        "processor": round(cpu / seconds, 2),
        "rss_before_mb": round(before),
        "rss_most_mb": round(max(mb for _, mb in memory)),
        "rss_end_mb": round(memory[-1][1]),
        "slope_mb_per_h": round(slope(memory[len(memory) // 2 :]), 1),
        "memory": [[round(at, 1), round(mb, 1)] for at, mb in memory],
    }


def main() -> None:
    parser = options(__doc__, "soak")
    parser.set_defaults(routers=["Wherry"])
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--streams", type=int, default=2000)
    args = parser.parse_args()
    prepare(args.routers)
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    rows = {}
    with workspace() as folder:
        for name in args.routers:
            rows[name] = measure(name, args, folder)
    save(args.json, {"minutes": args.minutes, "streams": args.streams, "rows": rows})
    headings = ["router", "at once", "complete", "lost", "refused", "left midway", "tokens/s", "processors"]
    headings += ["RSS MB most", "RSS MB end", "slope MB/h"]
    keys = ["most_at_once", "complete", "lost", "refused", "left", "tokens_per_s", "processor"]
    keys += ["rss_most_mb", "rss_end_mb", "slope_mb_per_h"]
    show(
        "Soak", headings, [[name, *(f"{row[k]:,}" for k in keys)] for name, row in rows.items()], markdown=args.markdown
    )


if __name__ == "__main__":
    main()
