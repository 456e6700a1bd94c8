"""What clients see when a worker fails, behind Wherry's router and others: the same engine, the same faults.

    python -m benchmarks.reliability [--routers NAME…] [--faults NAME…] [--rounds N] [--json FILE]

Prints a table and writes JSON. With --routers or --faults the file's other rows stay as they are.
"""

import argparse
import asyncio
import contextlib
import itertools
import json
import os
import platform
import random
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.engine import peers
from benchmarks.reliability.stacks import KINDS, Stack, stack
from rich.console import Console
from rich.progress import track
from rich.table import Table
from tests.reliability import client
from tests.reliability.history import Expected, Fault, Recorder
from tests.reliability.judge import judge, percentile
from tests.reliability.workload import CHAT, Client
from tests.reliability.workload import Fault as What
from tests.router.harness import MODEL

STREAMS = 24
TOKENS = 240
# Silence after which a client gives up and calls it a hang.
PATIENCE_S = 10.0
# What runs when a worker fails: every third stream begins only after that.
_FAULT_AT = 0.2
_TOPICS = ("boats", "猫", "Äpfel", "rockets 🚀", "int main(void) {", "| a | b |", "licences", "directories")


@dataclass(frozen=True)
class Row:
    """A fault: what is done to one worker of how many, and how long its running answers get if it is told to stop."""

    what: What
    workers: int = 3
    drain_s: int = 0


ROWS = {
    "killed (SIGKILL)": Row("kill"),
    "frozen (SIGSTOP)": Row("freeze"),
    "connections cut": Row("cut"),
    "connections silent": Row("swallow"),
    "network gone": Row("darken"),
    "stopped, answers outlast the drain": Row("drain"),
    "stopped, answers fit into the drain": Row("drain", drain_s=30),
    "the only worker killed, comes back": Row("kill", workers=1),
}
FIELDS = ("complete", "truncated", "refused", "hung", "wrong")
HEADINGS = ["a worker is", "router", *FIELDS, "gap p50 s", "gap p99 s"]


def request(number: int) -> dict[str, Any]:
    topic = _TOPICS[number % len(_TOPICS)]
    sampling = {"temperature": 0.8, "seed": number, "max_tokens": TOKENS, "ignore_eos": True}
    return {"model": MODEL, "messages": [{"role": "user", "content": f"Explain {topic}, {number}."}], **sampling}


async def undisturbed(one: Stack, numbers: range) -> dict[int, dict[str, Any]]:
    """The answers where nothing fails."""
    gate = asyncio.Semaphore(12)
    async with client.session() as http, one.front() as url:

        async def ask(number: int) -> tuple[int, dict[str, Any]]:
            async with gate:
                return number, await client.whole(http, url, CHAT, request(number))

        return dict(await asyncio.gather(*(ask(number) for number in numbers)))


async def measure(
    one: Stack, row: Row, answers: dict[int, dict[str, Any]], first: int
) -> tuple[Counter[str], list[float]]:
    """One round: `STREAMS` clients, one fault. How the streams ended, and the longest gap of each complete one."""
    await one.well()
    recorder = Recorder()
    rng = random.Random(first)
    total = STREAMS * TOKENS
    async with client.session() as http, one.front() as url:

        async def play(number: int) -> None:
            begins = 0.0 if number % 3 else _FAULT_AT + rng.random() * 0.2
            plain = Client(request=first + number, begins=begins, leaves_after=None, paced=False)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(recorder.reached(begins * total), 3)
            await client.stream(http, url, recorder, number, plain, CHAT, request(first + number), PATIENCE_S)

        for number in range(STREAMS):
            recorder.add(Expected, stream=number, body=answers[first + number])
        streams = [asyncio.create_task(play(number)) for number in range(STREAMS)]
        await recorder.reached(_FAULT_AT * total)
        recorder.add(Fault, what=row.what, target="worker-0")
        await one.workers.do(row.what, 0)
        await asyncio.gather(*streams)
        recorder.finish()
    verdict = judge(recorder.events)
    ends = verdict.outcomes
    counts = Counter(
        complete=ends["done"], truncated=ends["cut"] + ends["error"], refused=ends["refused"], hung=ends["hung"]
    )
    counts["wrong"] = verdict.wrong
    return counts, verdict.gaps


def cell(counts: Counter[str], gaps: list[float], streams: int) -> dict[str, Any]:
    """What one router did under one fault."""
    result: dict[str, Any] = {field: counts[field] for field in FIELDS}
    result["streams"] = streams
    if gaps:
        result |= {"gap_p50_s": round(percentile(gaps, 50), 3), "gap_p99_s": round(percentile(gaps, 99), 3)}
    return result


async def compare(name: str, faults: list[str], rounds: int) -> dict[str, dict[str, Any]]:
    """One router under `faults`, which need the same workers."""
    results = {}
    first = ROWS[faults[0]]
    async with stack(name, first.workers, first.drain_s) as one:
        answers = await undisturbed(one, range(rounds * STREAMS))
        for fault in track(faults, name, transient=True):
            counts: Counter[str] = Counter()
            gaps: list[float] = []
            for number in range(rounds):
                ends, found = await measure(one, ROWS[fault], answers, number * STREAMS)
                counts += ends
                gaps += found
            results[fault] = cell(counts, gaps, rounds * STREAMS)
    return results


def cells(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The table's rows, faults and routers in their order."""
    rows = []
    for fault in ROWS:
        for name in KINDS:
            if found := results.get(fault, {}).get(name):
                gaps = [f"{found[key]:.2f}" if key in found else "–" for key in ("gap_p50_s", "gap_p99_s")]
                rows.append([fault, name, *(str(found[field]) for field in FIELDS), *gaps])
    return rows


def show(results: dict[str, dict[str, Any]]) -> None:
    console = Console()
    console.width = max(console.width, 130)
    table = Table(*HEADINGS)
    last = ""
    for fault, *rest in cells(results):
        if last not in ("", fault):
            table.add_section()
        table.add_row(fault if fault != last else "", *rest)
        last = fault
    console.print(table)


def markdown(results: dict[str, dict[str, Any]]) -> str:
    """The table as docs/reliability.md has it."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *cells(results)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def save(path: Path, results: dict[str, dict[str, Any]]) -> None:
    machine = {"cpus": os.cpu_count(), "python": platform.python_version(), "system": platform.system()}
    body = {
        "faults": results,
        "peers": [line for peer in peers.ROUTERS.values() for line in peer.requirements],
        "machine": machine,
    }
    path.write_text(json.dumps(body, indent=1, ensure_ascii=False) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None, allow_abbrev=False)
    parser.add_argument("--routers", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--faults", nargs="+", choices=ROWS, default=list(ROWS), metavar="FAULT", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, default=3, help=f"of {STREAMS} streams each (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/reliability/results.json"))
    parser.add_argument("--markdown", action="store_true", help="print the table as the documentation has it")
    args = parser.parse_args()
    # Told to stop, it ends what it started, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if needed := [name for name in args.routers if name in peers.ROUTERS]:
        peers.main(needed)
    kept = json.loads(args.json.read_text()) if args.json.exists() else {}
    results: dict[str, dict[str, Any]] = kept.get("faults", {})
    for name in args.routers:
        for _, alike in itertools.groupby(args.faults, lambda fault: (ROWS[fault].workers, ROWS[fault].drain_s)):
            for fault, found in asyncio.run(compare(name, list(alike), args.rounds)).items():
                results.setdefault(fault, {})[name] = found
            save(args.json, results)
    if args.markdown:
        print(markdown(results))
    else:
        show(results)


if __name__ == "__main__":
    main()
