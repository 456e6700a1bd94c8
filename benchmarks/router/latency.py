"""What routers add to a request, one at a time: the same request directly and through each of them, in turns.

    python -m benchmarks.router.latency [--rounds N] [--turn N] [--routers NAME…] [--json FILE] [--markdown]

All routers run at once before one mock worker. Each round gives every one of them a turn of a few requests of each
kind, in a new order, so that what else the machine does falls on all alike.
"""

import asyncio
import contextlib
import random
from typing import Any

import uvloop
from benchmarks.router.report import DIRECT, options, percentile, prepare, save, show
from benchmarks.router.routers import NATIVE, Running, mocks, router, workspace
from benchmarks.router.wire import Connection, chat, connect
from rich.progress import track

REQUESTS = {"whole": chat(1, stream=False), "first": chat(1, stream=True)}
WARM_UP = 3  # rounds


async def measure(urls: dict[str, str], rounds: int, turn: int) -> dict[str, dict[str, list[float]]]:
    """Seconds of each request: whole answers, and to a stream's first byte."""
    rng = random.Random(0)
    connections: dict[str, Connection] = {name: await connect(url) for name, url in urls.items()}
    taken: dict[str, dict[str, list[float]]] = {name: {"whole": [], "first": []} for name in urls}
    names = list(urls)
    for number in track(range(rounds + WARM_UP), "one request at a time", transient=True):
        rng.shuffle(names)
        for name in names:
            for kind in ("whole", "first") * turn:
                if not connections[name].open:
                    connections[name] = await connect(urls[name])
                answer = await connections[name].ask(REQUESTS[kind])
                if answer.status != 200:
                    raise RuntimeError(f"{name} answered {answer.status}")
                if number >= WARM_UP:
                    taken[name][kind].append(answer.whole_s if kind == "whole" else answer.first_s)
    for connection in connections.values():
        connection.close()
    return taken


def summary(taken: dict[str, dict[str, list[float]]]) -> dict[str, dict[str, float]]:
    """Milliseconds: what each takes, and what it adds to the direct call, percentile by percentile."""
    rows = {}
    for name, kinds in taken.items():
        row = {}
        for kind, values in kinds.items():
            for share in (50, 99):
                own, direct = (percentile(v, share) * 1e3 for v in (values, taken[DIRECT][kind]))
                row[f"{kind}_p{share}_ms"] = round(own, 3)
                row[f"{kind}_added_p{share}_ms"] = round(own - direct, 3)
        rows[name] = row
    return rows


def verdict(rows: dict[str, dict[str, float]]) -> list[str]:
    """Wherry against the targets, in words."""
    added = {name: row["whole_added_p50_ms"] for name, row in rows.items() if name != DIRECT}
    if "Wherry" not in added:
        return []
    own = added["Wherry"]
    lines = [f"Wherry adds {own:.2f} ms at p50, {rows['Wherry']['whole_added_p99_ms']:.2f} ms at p99"]
    lines += [f"{own / added[name]:.1f} times what {name} adds" for name in (*NATIVE, "LiteLLM") if name in added]
    return lines


def main() -> None:
    parser = options(__doc__, "latency")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--turn", type=int, default=20, help="requests of each kind in a turn (%(default)s)")
    args = parser.parse_args()
    prepare(args.routers)
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(workspace())
        workers = stack.enter_context(mocks(folder, 1))
        running: dict[str, Running] = {n: stack.enter_context(router(n, workers, folder)) for n in args.routers}
        urls = {DIRECT: workers[0]} | {name: one.url for name, one in running.items()}
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            rows: dict[str, dict[str, Any]] = summary(runner.run(measure(urls, args.rounds, args.turn)))  # type: ignore[assignment]
        for name, one in running.items():
            rows[name]["rss_mb"] = round(one.rss_mb())
    save(args.json, {"rounds": args.rounds, "turn": args.turn, "rows": rows})
    headings = ["one at a time, ms", "p50", "p99", "added p50", "added p99", "stream's first byte p50", "p99", "RSS MB"]
    columns = [
        "whole_p50_ms",
        "whole_p99_ms",
        "whole_added_p50_ms",
        "whole_added_p99_ms",
        "first_p50_ms",
        "first_p99_ms",
    ]
    table = [[n, *(f"{row[c]:.2f}" for c in columns), str(row.get("rss_mb", ""))] for n, row in rows.items()]
    show("Latency", headings, table, markdown=args.markdown)
    print("\n".join(verdict(rows)))


if __name__ == "__main__":
    main()
