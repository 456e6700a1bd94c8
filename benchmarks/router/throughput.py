"""What a router passes on when it has one processor: whole answers, and streams of 32 tokens.

    python -m benchmarks.router.throughput [--seconds N] [--at-once N] [--routers NAME…] [--json FILE] [--markdown]

The router has the last processor to itself; the mock worker and the client share the others. The row `direct` is
client and mock worker alone: where a router comes near it, it is these that are measured.
"""

import asyncio
import contextlib
import os
import time
from pathlib import Path
from typing import Any

import uvloop
from benchmarks.router.report import DIRECT, options, percentile, prepare, save, show
from benchmarks.router.routers import Running, mocks, router, workspace
from benchmarks.router.wire import Answer, Connection, Lost, chat, connect
from rich.progress import track

TOKENS = 32
WARM_UP_S = 1.0
KINDS = {"whole": chat(1, stream=False), "streams": chat(TOKENS, stream=True)}


def whole(answer: Answer, kind: str) -> bool:
    """Whether nothing is missing."""
    return answer.status == 200 and (kind == "whole" or (answer.done and answer.pieces == TOKENS))


async def load(url: str, kind: str, at_once: int, seconds: float) -> dict[str, Any]:
    """`at_once` connections, each with its next request as soon as the last is answered."""
    began = time.perf_counter() + WARM_UP_S
    until = began + seconds
    taken: list[float] = []
    failed = 0

    async def client() -> None:
        nonlocal failed
        connection: Connection | None = None
        while (now := time.perf_counter()) < until:
            try:
                if connection is None or not connection.open:
                    connection = await connect(url)
                answer = await connection.ask(KINDS[kind])
            except Lost:
                failed += 1
                continue
            if not whole(answer, kind):
                failed += 1
            elif now >= began:
                taken.append(answer.whole_s)
        if connection is not None:
            connection.close()

    await asyncio.gather(*(client() for _ in range(at_once)))
    rate = len(taken) / seconds
    row: dict[str, Any] = {f"{kind}_per_s": round(rate, 1), f"{kind}_failed": failed}
    if taken:
        row[f"{kind}_p99_ms"] = round(percentile(taken, 99) * 1e3, 2)
    return row


def measure(url: str, at_once: int, seconds: float, running: Running | None) -> dict[str, Any]:
    """Both kinds, one after the other, and the processor time of the router in each."""
    row: dict[str, Any] = {}
    for kind in KINDS:
        before = running.cpu_s() if running else 0.0
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            row |= runner.run(load(url, kind, at_once, seconds))
        if running:
            row[f"{kind}_cpu_share"] = round((running.cpu_s() - before) / (seconds + WARM_UP_S), 2)
    return row


def run(name: str, args: Any, folder: Path, processors: list[int]) -> dict[str, Any]:
    """One row; the router's processor is the last one."""
    *others, last = processors
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(mocks(folder, 1, cpu=others[0] if others else last))
        if name == DIRECT:
            return measure(workers[0], args.at_once, args.seconds, None)
        running = stack.enter_context(router(name, workers, folder, cpu=last))
        row = measure(running.url, args.at_once, args.seconds, running)
        return row | {"rss_mb": round(running.rss_mb())}


def main() -> None:
    parser = options(__doc__, "throughput")
    parser.add_argument("--seconds", type=float, default=8.0, help="for each kind and router (%(default)s)")
    parser.add_argument("--at-once", type=int, default=32, help="requests at a time (%(default)s)")
    args = parser.parse_args()
    prepare(args.routers)
    processors = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, processors[:-1] or processors)
    rows = {}
    with workspace() as folder:
        for name in track([DIRECT, *args.routers], "throughput", transient=True):
            rows[name] = run(name, args, folder, processors)
    save(args.json, {"seconds": args.seconds, "at_once": args.at_once, "tokens": TOKENS, "rows": rows})
    headings = [
        "one processor",
        "answers/s",
        "p99 ms",
        f"streams of {TOKENS}/s",
        "tokens/s",
        "p99 ms",
        "processor used",
        "failed",
        "RSS MB",
    ]
    table = []
    for name, row in rows.items():
        used = "–" if name == DIRECT else f"{row['whole_cpu_share']:.0%}, {row['streams_cpu_share']:.0%}"
        figures = [f"{row['whole_per_s']:,.0f}", f"{row.get('whole_p99_ms', 0):.1f}", f"{row['streams_per_s']:,.0f}"]
        figures += [f"{row['streams_per_s'] * TOKENS:,.0f}", f"{row.get('streams_p99_ms', 0):.1f}", used]
        table.append([name, *figures, str(row["whole_failed"] + row["streams_failed"]), str(row.get("rss_mb", "–"))])
    show("Throughput", headings, table, markdown=args.markdown)


if __name__ == "__main__":
    main()
