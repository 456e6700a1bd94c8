"""Routers and policies in front of simulated replicas: how many requests a second they bear at an equal p99 TTFT.

    python -m benchmarks.router.policies [--workload NAME …] [--stack NAME …] [--json FILE]

Each stack (a router and the workers it speaks to, fresh for every rate) gets the same requests at the same times, at
growing rates, as long as the 99th percentile of the time to the first token stays under the bound. Requests come
whether or not earlier ones are answered. Times are those of the simulated device, which runs at `--speed` of real
time so that machine, client and routers are not what is measured. Results of stacks that are not run again are kept.
"""

import argparse
import asyncio
import contextlib
import functools
import itertools
import json
import math
import os
import platform
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import uvloop
from benchmarks.engine.peers import install, installed, python
from benchmarks.router.workloads import WORKLOADS, Session
from rich.console import Console
from rich.table import Table
from tests.reliability.world import free_port
from tests.router.harness import TINY

MODEL = "chat"
REPLICAS = 8
# A cache that holds an eighth of what the workloads come back to: which replica has what, matters.
SHAPE = ("--kv-tokens", "100000", "--max-running", "64", "--tokens-per-event", "16", "--max-queued", "1000")
RATES = (2, 3, 4, 6, 9, 13, 19, 28, 40, 57, 80, 113, 160)
TOKEN_BYTES = 2 * 12 * 4 * 64 * 2  # of KV cache, for a token of the real replicas' model
BOUND_S = 2.0  # p99 of the time to the first token, of the device's time
FILE = Path(__file__).with_name("policies.json")

_console = Console(stderr=True)


@dataclass(frozen=True)
class Stack:
    """What workers speak (`real`: the worker API, with a model), the router's command for their URLs and a port, and
    the rate (index) to begin with."""

    api: str
    command: Callable[[list[str], int], list[str]]
    begin: int


def _wherry(policy: str) -> Callable[[list[str], int], list[str]]:
    def command(urls: list[str], port: int) -> list[str]:
        flags = ["--endpoints", ",".join(urls), "--model", MODEL, "--port", str(port), "--policy", policy]
        return [sys.executable, "-m", "wherry_router", *flags, "--max-concurrent", "8000", "--max-per-replica", "2000"]

    return command


def _peer(name: str, module: str) -> Callable[[list[str], int], list[str]]:
    def command(urls: list[str], port: int) -> list[str]:
        own = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        flags = ["--policy", "cache_aware", "--worker-startup-check-interval", "1"]
        return [str(python(name)), "-m", module, *own, *flags, "--worker-urls", *urls]

    return command


STACKS = {
    "Wherry, random": Stack("worker", _wherry("random"), 4),
    "Wherry, least-tokens": Stack("worker", _wherry("least-tokens"), 4),
    "Wherry, prefix-aware": Stack("worker", _wherry("prefix-aware"), 9),
    "3 real replicas, random": Stack("real", _wherry("random"), 2),
    "3 real replicas, prefix-aware": Stack("real", _wherry("prefix-aware"), 5),
    "vllm-router, cache_aware": Stack("openai", _peer("vllm-router", "vllm_router.launch_router"), 7),
    "sglang-router, cache_aware": Stack("openai", _peer("sglang-router", "sglang_router.launch_router"), 7),
}


@dataclass
class Point:
    """A stack under one rate. Times in seconds of the device."""

    rate: float
    answered: float  # requests a second
    failed: int
    p50: float
    p99: float
    cached: float  # share of the prompts' tokens
    max_over_mean: float  # of the tokens that each replica computed
    late: float  # the most by which the client sent a request late, in real seconds

    @property
    def holds(self) -> bool:
        """Whether the stack bears it."""
        return self.p99 <= BOUND_S and not self.failed


@contextlib.contextmanager
def process(command: list[str]) -> Iterator[subprocess.Popen[str]]:
    """A child process; its errors go to a file, which is shown should it not do what it is to."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("WHERRY_")} | {"RUST_LOG": "error"}
    with tempfile.TemporaryFile("w+") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=env)
        try:
            yield child
        finally:
            child.terminate()
            try:
                child.communicate(timeout=15)
            except subprocess.TimeoutExpired:
                child.kill()
                child.communicate()
            log.seek(0)
            if "too slow" in log.read():
                _console.print("[red]The machine is too slow for this rate: lower --speed.")


@contextlib.contextmanager
def workers(api: str, speed: float) -> Iterator[list[str]]:
    """The addresses of replicas, simulated or real."""
    if api == "real":
        with contextlib.ExitStack() as opened:
            model = _random_model(Path(opened.enter_context(tempfile.TemporaryDirectory())))
            yield [opened.enter_context(_real(model)) for _ in range(3)]
        return
    flags = ["--replicas", str(REPLICAS), "--port", "0", "--model", MODEL, "--api", api, "--speed", str(speed), *SHAPE]
    with process([sys.executable, "-m", "wherry_cli.main", "simulate", *flags]) as child:
        if child.stdout is None:
            raise RuntimeError("the child has no output")
        yield [json.loads(child.stdout.readline())["url"] for _ in range(REPLICAS)]


def _random_model(directory: Path) -> Path:
    """A model of 39 million random parameters with the sample's tokenizer: large enough that a prompt costs more than
    what goes on around it, which the sample model is not."""
    import torch
    from safetensors.torch import save_file

    from wherry_runtime.models.decoder import Decoder
    from wherry_runtime.models.registry import read_config
    from wherry_runtime.quantization.storage import Storage

    for path in TINY.glob("tokenizer*.json"):
        shutil.copy(path, directory)
    size = {"hidden_size": 512, "head_dim": 64, "intermediate_size": 1408, "num_hidden_layers": 12}
    raw = json.loads((TINY / "config.json").read_text()) | size
    (directory / "config.json").write_text(json.dumps(raw))
    model = Decoder(read_config(directory), 1, Storage(torch.bfloat16, torch.device("meta")))
    generator = torch.Generator().manual_seed(1)
    tensors = {n: torch.randn(s.shape, generator=generator).mul_(0.02).bfloat16() for n, s in model.slots().items()}
    save_file(tensors, directory / "model.safetensors")
    return directory


@contextlib.contextmanager
def _real(directory: Path) -> Iterator[str]:
    """The address of a worker with the model and a cache of 20,000 tokens: ten of the 24 prompts."""
    port = free_port()
    size = (
        "--kv-cache-bytes",
        str(20_000 * TOKEN_BYTES),
        "--max-queued",
        "1000",
        "--threads",
        "1",
        "--port",
        str(port),
    )
    model = ("--model-name", MODEL, "--model-uri", f"file://{directory}")
    with process([sys.executable, "-m", "wherry_runtime", *model, *size]):
        yield f"http://127.0.0.1:{port}"


async def counted(session: aiohttp.ClientSession, urls: list[str]) -> list[tuple[float, float, float]]:
    """Prompt tokens, those of them that were cached, and answered tokens so far, of each worker."""
    names = ("wherry_prompt_tokens_total", "wherry_prefix_cache_hits_total", "wherry_generation_tokens_total")

    async def one(url: str) -> tuple[float, float, float]:
        async with session.get(url + "/metrics") as response:
            page = await response.text()
        found = [re.search(rf"^{name}(?:{{.*}})? (\S+)$", page, re.MULTILINE) for name in names]
        prompt, cached, answered = (float(match[1]) if match else 0.0 for match in found)
        return prompt, cached, answered

    return await asyncio.gather(*(one(url) for url in urls))


@dataclass
class Load:
    """Sends sessions as they come, in real time."""

    session: aiohttp.ClientSession
    url: str
    speed: float
    warm_until: float = 0.0
    ttft: list[float] = field(default_factory=list)
    answered: int = 0
    failed: int = 0
    late: float = 0.0
    tasks: set[asyncio.Task[None]] = field(default_factory=set)

    async def run(self, sessions: list[Session], began: float) -> None:
        for one in sessions:
            due = began + one.at / self.speed
            await asyncio.sleep(max(due - time.perf_counter(), 0.0))
            self.late = max(self.late, time.perf_counter() - due)
            task = asyncio.create_task(self._converse(one))
            self.tasks.add(task)
            task.add_done_callback(self.tasks.discard)

    async def _converse(self, one: Session) -> None:
        for turn in one.turns:
            await asyncio.sleep(turn.pause_s / self.speed)
            one.history.append({"role": "user", "content": turn.added})
            answer = await self._ask(one, turn.output)
            if answer is None:
                return
            one.history.append({"role": "assistant", "content": answer})

    async def _ask(self, one: Session, output: int) -> str | None:
        body = {"model": MODEL, "messages": one.history, "max_tokens": output, "stream": True, "ignore_eos": True}
        sent = time.perf_counter()
        counts = sent > self.warm_until
        problem = ""
        first, parts = 0.0, []
        try:
            async with self.session.post(self.url + "/v1/chat/completions", json=body) as response:
                if response.status != 200:
                    problem = f"{response.status}: {(await response.text())[:300]}"
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        content = json.loads(line[6:])["choices"][0]["delta"].get("content")
                        if content:
                            first = first or time.perf_counter()
                            parts.append(content)
        except (aiohttp.ClientError, OSError, KeyError) as error:
            problem = f"{type(error).__name__}: {error}"
        if problem or not first:
            if not self.failed:
                _console.print(f"[red]{problem or 'an answer without text'}", markup=True)
            self.failed += counts
            return None
        self.answered += time.perf_counter() > self.warm_until
        if counts:
            self.ttft.append(first - sent)
        return "".join(parts)


async def ready(session: aiohttp.ClientSession, url: str) -> None:
    """Returns once the router has all workers: it answers often enough for each to have had its turn."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
    deadline = time.perf_counter() + 60
    good = 0
    while good < 3 * REPLICAS:
        try:
            async with session.post(url + "/v1/chat/completions", json=body) as response:
                good = good + 1 if response.status == 200 else 0
                await response.read()
        except aiohttp.ClientError:
            good = 0
        if not good:
            if time.perf_counter() > deadline:
                raise RuntimeError(f"the router at {url} does not answer")
            await asyncio.sleep(0.2)


async def measure(urls: list[str], url: str, workload: str, rate: float, args: argparse.Namespace) -> Point:
    timeout = aiohttp.ClientTimeout(total=None)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout, read_bufsize=2**20) as session:
        await ready(session, url)
        seconds = (args.warm + args.seconds) * args.speed
        sessions = list(itertools.takewhile(lambda s: s.at < seconds, WORKLOADS[workload].sessions(rate)))
        began = time.perf_counter() + 0.1
        load = Load(session, url, args.speed, warm_until=began + args.warm)
        sending = asyncio.create_task(load.run(sessions, began))
        await asyncio.sleep(args.warm)
        before = await counted(session, urls)
        await sending
        await asyncio.sleep(max(began + args.warm + args.seconds - time.perf_counter(), 0.0))
        after = await counted(session, urls)
        answered = load.answered / args.seconds / args.speed
        # What is still on its way counts, too, unless it takes forever: a router that starves some is not let off.
        left = {task for task in load.tasks if not task.done()}
        waited = BOUND_S / args.speed * 1.5
        if left:
            await asyncio.wait(left, timeout=waited)
        for task in load.tasks:
            task.cancel()
        await asyncio.gather(*load.tasks, return_exceptions=True)
    return _point(rate, load, answered, before, after, args.speed)


def _point(
    rate: float,
    load: Load,
    answered: float,
    before: list[tuple[float, float, float]],
    after: list[tuple[float, float, float]],
    speed: float,
) -> Point:
    deltas = [[b - a for a, b in zip(one, other, strict=True)] for one, other in zip(before, after, strict=True)]
    work = [prompt - cached + output for prompt, cached, output in deltas]
    prompts = sum(prompt for prompt, _, _ in deltas)
    ttft = sorted(seconds * speed for seconds in load.ttft) or [float("inf")]
    return Point(
        rate=rate,
        answered=answered,
        failed=load.failed,
        p50=ttft[len(ttft) // 2],
        p99=ttft[min(int(0.99 * len(ttft)), len(ttft) - 1)],
        cached=sum(cached for _, cached, _ in deltas) / prompts if prompts else 0.0,
        max_over_mean=max(work) / statistics.fmean(work) if sum(work) else 0.0,
        late=load.late,
    )


def point(name: str, workload: str, args: argparse.Namespace, rate: float) -> Point:
    """One rate, with fresh workers and a fresh router."""
    stack = STACKS[name]
    if stack.api == "real":
        args = argparse.Namespace(**{**vars(args), "speed": 1.0})
    with workers(stack.api, args.speed) as urls:
        port = free_port()
        with process(stack.command(urls, port)), asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            found = runner.run(measure(urls, f"http://127.0.0.1:{port}", workload, rate, args))
    _console.print(
        f"{workload}, {name}, {rate}/s: answered {found.answered:.1f}/s, TTFT p50 {found.p50:.2f} p99 {found.p99:.2f}"
        f" s, cached {found.cached:.0%}, max/mean {found.max_over_mean:.2f}, failed {found.failed},"
        f" late {found.late:.2f} s"
    )
    return found


def climb(points: dict[float, Point], begin: int, measured: Callable[[float], Point]) -> Iterator[Point]:
    """Adds points up to the highest rate that a stack bears and the first one that it does not, then two between them,
    and tells each."""

    def at(rate: float) -> Point:
        if rate not in points:
            points[rate] = measured(rate)
        return points[rate]

    index, step = begin, 0
    while 0 <= index < len(RATES):
        found = at(RATES[index])
        yield found
        if step and found.holds != (step > 0):
            break
        step = step or (1 if found.holds else -1)
        index += step
    else:
        return
    good, bad = sorted((RATES[index], RATES[index - step]))
    for _ in range(2):
        found = at(round(math.sqrt(good * bad), 1))
        yield found
        good, bad = (found.rate, bad) if found.holds else (good, found.rate)


def show(results: dict[str, dict[str, list[dict[str, Any]]]]) -> None:
    """The highest rate that each bears, and how it is then."""
    for workload, stacks in results.items():
        table = Table("router", "requests/s", "× random", "p50 s", "p99 s", "cached", "max/mean", title=workload)
        best = {name: [p for p in points if p["p99"] <= BOUND_S and not p["failed"]] for name, points in stacks.items()}
        base = best.get("Wherry, random") or best.get("3 real replicas, random")
        for name in (name for name in STACKS if name in stacks):
            if not best[name]:
                table.add_row(name, f"< {stacks[name][0]['rate']}", "", "", "", "", "")
                continue
            top = best[name][-1]
            table.add_row(
                name,
                str(top["rate"]),
                f"{top['rate'] / base[-1]['rate']:.1f}" if base else "",
                f"{top['p50']:.2f}",
                f"{top['p99']:.2f}",
                f"{top['cached']:.0%}",
                f"{top['max_over_mean']:.2f}",
            )
        Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workload", nargs="+", choices=WORKLOADS, default=["shared-prefix", "multi-turn", "real"])
    parser.add_argument("--stack", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--go-on", action="store_true", help="with what is in the file of stacks that were cut short")
    parser.add_argument("--speed", type=float, default=0.5, help="of the simulated device, of real time")
    parser.add_argument("--warm", type=float, default=16, help="seconds of real time before anything counts")
    parser.add_argument("--seconds", type=float, default=24)
    parser.add_argument("--json", type=Path, default=FILE)
    args = parser.parse_args()
    # Told to stop, it ends what it started, as on Ctrl-C.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for name in {"vllm-router", "sglang-router"} & {stack.split(",")[0] for stack in args.stack}:
        if not installed(name):
            install(name)
    kept = json.loads(args.json.read_text()) if args.json.exists() else {"results": {}}
    kept["machine"] = {"cpus": os.cpu_count(), "python": platform.python_version(), "speed": args.speed}
    for workload, name in itertools.product(args.workload, args.stack):
        if (workload == "real") != (STACKS[name].api == "real"):
            continue
        stacks = kept["results"].setdefault(workload, {})
        points = {one["rate"]: Point(**one) for one in stacks.get(name, [])} if args.go_on else {}

        for _ in climb(points, STACKS[name].begin, functools.partial(point, name, workload, args)):
            stacks[name] = [asdict(points[rate]) for rate in sorted(points)]
            args.json.write_text(json.dumps(kept, indent=1) + "\n")
    show(kept["results"])


if __name__ == "__main__":
    main()
