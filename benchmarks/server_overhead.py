"""What the server costs: `wherry serve` streaming to many clients, and the engine alone with the same requests.

    python -m benchmarks.server_overhead [--model DIR] [--clients 16] [--rounds 3] [--json FILE] [-- ENGINE FLAGS]

Both run as processes of their own, in turns; the clients are one more process, so that reading the streams takes no
time from the server's interpreter (but from its cores, where there are few). Arguments after `--` are the engine's
flags, such as `--quantization int8`. Each client sends its prompt and reads its stream to the end; tokens per second
are those of all together, from the first request to the last token.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import aiohttp
from benchmarks.engine import models, report
from benchmarks.engine.workload import die_with_parent
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from wherry_cli.bench_times import Stream
from wherry_protocol.engine_config import EngineConfig, from_args

NAME = "bench"
START_S = 180.0
console = Console(stderr=True)


def prompts(args: argparse.Namespace, salt: int) -> list[list[int]]:
    vocab_size = models.vocab_size(args.model)
    draw = random.Random(salt)
    return [[draw.randrange(3, vocab_size) for _ in range(args.prompt_tokens)] for _ in range(args.clients)]


def engine_arguments(args: argparse.Namespace) -> list[str]:
    return ["--max-running", str(args.clients), "--threads", str(args.threads), *args.engine]


def rate(streams: list[Stream]) -> dict[str, float]:
    """Tokens per second of all, and the median gap between tokens of one, in seconds."""
    gaps = [b - a for s in streams for a, b in zip(s.tokens, s.tokens[1:], strict=False)]
    seconds = max(s.tokens[-1] for s in streams) - min(s.sent for s in streams)
    first = statistics.median(s.tokens[0] - s.sent for s in streams)
    return {
        "rate": sum(len(s.tokens) for s in streams) / seconds,
        "gap_s": statistics.median(gaps),
        "first_token_s": first,
    }


def engine_config(args: argparse.Namespace) -> EngineConfig:
    uri = f"file://{args.model.resolve()}"
    return from_args(["--model-name", NAME, "--model-uri", uri, *engine_arguments(args)])


async def engine_alone(args: argparse.Namespace) -> list[dict[str, float]]:
    """The engine's own throughput, `--runs` times after one to warm up."""
    config = engine_config(args)

    from wherry_cli.bench_engine import Meter  # it and the engine take seconds to import; clients need neither
    from wherry_runtime.engine.async_engine import AsyncEngine

    engine = AsyncEngine(config)
    await engine.start()
    meter = Meter(engine, models.vocab_size(args.model))
    results = []
    for run in range(args.runs + 1):
        streams = await asyncio.gather(*(meter.stream(p, args.new_tokens) for p in prompts(args, run)))
        results.append(rate(list(streams)))
    await engine.close()
    return results[1:]


async def read_stream(session: aiohttp.ClientSession, url: str, prompt: list[int], new_tokens: int) -> Stream:
    """One completion. A chunk that has no text may still hold a token, so tokens are counted by the server's usage,
    spread over the chunks as they came."""
    body = {"model": NAME, "prompt": prompt, "max_tokens": new_tokens, "temperature": 0, "ignore_eos": True}
    body |= {"stream": True, "stream_options": {"include_usage": True}}
    stream, stamps, made = Stream(time.perf_counter()), [], 0
    async with session.post(url + "/v1/completions", json=body) as response:
        if response.status != 200:
            raise SystemExit(f"{response.status}: {await response.text()}")
        async for line in response.content:
            if line.startswith(b"data: ") and line != b"data: [DONE]\n":
                stamps.append(time.perf_counter())
                made = (json.loads(line[6:]).get("usage") or {}).get("completion_tokens", made)
    if made != new_tokens:
        raise SystemExit(f"the server made {made} tokens and not {new_tokens}")
    # The last chunks are the finish reason's and the usage's; with one token a chunk there are as many as tokens.
    stream.tokens = [stamps[min(i, len(stamps) - 1)] for i in range(made - 1)] + [stamps[-1]]
    return stream


async def clients(args: argparse.Namespace) -> list[dict[str, float]]:
    """What the clients of the server at `--url` see."""
    timeout = aiohttp.ClientTimeout(total=600)
    results = []
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        for run in range(args.runs + 1):
            work = (read_stream(session, args.url, p, args.new_tokens) for p in prompts(args, run))
            results.append(rate(list(await asyncio.gather(*work))))
    return results[1:]


@contextlib.contextmanager
def server(args: argparse.Namespace) -> Iterator[str]:
    """`wherry serve` on a free port, once it answers: its URL."""
    command = [sys.executable, "-m", "wherry_cli.main", "serve", str(args.model), "--port", "0", "--model-name", NAME]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [*command, *engine_arguments(args)], stderr=log, env={**os.environ, "COLUMNS": "200"}
        )
        try:
            deadline = time.monotonic() + START_S
            found = None
            while found is None:
                log.seek(0)
                text = log.read()
                found = re.search(r"served at (http://\S+)/v1", text)
                if process.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"wherry serve did not start:\n{text}")
                time.sleep(0.1)
            yield found[1]
        finally:
            process.terminate()
            process.wait(30)


def child(args: argparse.Namespace, role: str, url: str = "") -> list[dict[str, float]]:
    """Runs this module as `role` in a process of its own."""
    own = ["--model", args.model, "--clients", args.clients, "--runs", args.runs, "--threads", args.threads]
    own += ["--prompt-tokens", args.prompt_tokens, "--new-tokens", args.new_tokens, "--role", role, "--url", url]
    command = [sys.executable, "-m", "benchmarks.server_overhead", *map(str, own), "--", *args.engine]
    done = subprocess.run(command, cwd=models.ROOT, stdout=subprocess.PIPE, check=True, text=True)
    return list(json.loads(done.stdout.splitlines()[-1]))


def compare(args: argparse.Namespace) -> dict[str, Any]:
    rounds = []
    with Progress(console=console, transient=True) as progress:
        for _ in progress.track(range(args.rounds), description="measuring"):
            alone = child(args, "engine")
            with server(args) as url:
                served = child(args, "clients", url)
            rounds.append({"engine": alone, "server": served})
    medians = [{k: statistics.median(r["rate"] for r in one[k]) for k in ("engine", "server")} for one in rounds]
    return {
        "model": "server",
        "checkpoint": args.model.name,
        "clients": args.clients,
        "new_tokens": args.new_tokens,
        "engine_flags": args.engine,
        "rounds": rounds,
        "ratios": [m["server"] / m["engine"] for m in medians],
    }


def markdown(result: dict[str, Any]) -> str:
    """For the page: one row."""
    columns = [[run["rate"] for one in result["rounds"] for run in one[name]] for name in ("engine", "server")]
    row = [result["checkpoint"], " ".join(result["engine_flags"]) or "–", str(result["clients"])]
    row += [report.span(column, report.rate_text) for column in columns]
    header = ["model", "flags", "clients", "engine, tokens/s", "server, tokens/s", "server / engine"]
    return report.markdown(header, [[*row, report.span(result["ratios"], "{:.1%}".format)]])


def show(result: dict[str, Any]) -> None:
    table = Table(
        "", "tokens/s", "between tokens, ms", "first token, ms", title=f"{result['clients']} streams at a time"
    )
    for name in ("engine", "server"):
        runs = [run for one in result["rounds"] for run in one[name]]
        columns = [
            [r["rate"] for r in runs],
            [r["gap_s"] * 1e3 for r in runs],
            [r["first_token_s"] * 1e3 for r in runs],
        ]
        table.add_row(name, *(f"{statistics.median(c):.1f} ({min(c):.1f} … {max(c):.1f})" for c in columns))
    ratios = result["ratios"]
    Console().print(table)
    Console().print(
        f"server / engine: {statistics.median(ratios):.1%} ({min(ratios):.1%} … {max(ratios):.1%}), target ≥ 92%"
    )


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.server_overhead")
    parser.add_argument("--model", type=Path, default=models.SAMPLE)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--runs", type=int, default=2, help="in a round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--role", choices=["compare", "engine", "clients"], default="compare", help=argparse.SUPPRESS)
    parser.add_argument("--url", default="", help=argparse.SUPPRESS)
    parser.add_argument("engine", nargs="*", help="flags of the engine, after --")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if args.role != "compare":
        die_with_parent()
        print(json.dumps(asyncio.run(engine_alone(args) if args.role == "engine" else clients(args))))
        return
    result = compare(args)
    show(result)
    if args.json:
        result["table"] = markdown(result)
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
