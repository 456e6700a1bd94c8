"""A world to break: routers in front of workers that can be killed, frozen and cut off, and that come back."""

import asyncio
import contextlib
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import aiohttp
import msgspec
import psutil
from tests.reliability.proxy import Proxy
from tests.reliability.workload import FAULTS, RANK_FAULTS, Fault
from tests.router.harness import MODEL, ROOT, TINY

from wherry_protocol.naming import ENV_WORKER_TOKEN
from wherry_protocol.router_report import PATH as REPORT_PATH
from wherry_protocol.router_report import RouterReport
from wherry_protocol.worker import LoadReport

TOKEN = "reliability"
_HEADERS = {"authorization": f"Bearer {TOKEN}"}
_report = msgspec.json.Decoder(RouterReport).decode
_load = msgspec.json.Decoder(LoadReport).decode


class World(Protocol):
    """What an episode needs. Workers are numbered from 0."""

    model: str
    routers: Sequence[str]  # URLs
    size: int
    faults: tuple[Fault, ...]  # those that this world can do

    async def healthy(self) -> set[int]:
        """Workers that every router sends requests to."""
        ...

    async def do(self, what: Fault, worker: int) -> None:
        """Breaks something. Returns when it is broken."""
        ...

    async def mend(self, worker: int) -> None:
        """Ends what `freeze`, `swallow` and `darken` did; what died comes back by itself."""
        ...

    async def loads(self) -> dict[str, tuple[int, int]]:
        """Requests running and waiting on each worker that answers."""
        ...


async def until(probe: Callable[[], Awaitable[bool]], what: str, timeout_s: float = 60.0) -> None:
    """Returns once `probe` says yes.

    Raises:
        AssertionError: it did not in time.
    """
    deadline = time.monotonic() + timeout_s
    while not await probe():
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout_s:g} s for {what}")
        await asyncio.sleep(0.05)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def last_words(logs: Path) -> str:
    """The end of each log."""
    return "\n".join(f"{log.name}: {log.read_text(errors='replace')[-1500:]}" for log in sorted(logs.glob("*.log")))


class Child:
    """A process that is started again whenever it ends, as a kubelet does, until it is stopped.

    `command`: the program and its arguments.
    """

    def __init__(self, name: str, logs: Path, *command: str, env: dict[str, str] | None = None) -> None:
        self.name = name
        self.log_path = logs / f"{name}.log"
        self._command = command
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WHERRY_", "POD_"))}
        self._env = environment | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"} | (env or {})
        self._process: asyncio.subprocess.Process | None = None
        self._task: asyncio.Task[None] | None = None
        self.may_start = asyncio.Event()  # cleared: it is not started again for now
        self.may_start.set()
        self.starts = 0

    async def start(self) -> None:
        await self._spawn()
        self._task = asyncio.create_task(self._keep())

    async def _spawn(self) -> None:
        with self.log_path.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *self._command, cwd=ROOT, env=self._env, stdout=log, stderr=log
            )
        self.starts += 1

    async def _keep(self) -> None:
        while self._process is not None:
            await self._process.wait()
            await self.may_start.wait()
            await self._spawn()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise RuntimeError(f"{self.name} was not started")
        return self._process.pid

    def signal(self, number: int) -> None:
        """Sends a signal, unless it has just ended."""
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(number)

    async def stop(self) -> None:
        """Ends it for good."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            await self._process.wait()


def engine_flags(port: int, drain_s: int = 1) -> list[str]:
    """Settings of a small engine whose seeded answers are the same whatever else runs."""
    settings = {
        "--model-name": MODEL,
        "--port": port,
        "--threads": 1,
        "--dtype": "float32",
        "--max-running": 32,
        "--kv-cache-bytes": 64 * 2**20,
        "--drain-timeout-s": drain_s,
    }
    return [str(part) for pair in settings.items() for part in pair]


class Worker:
    """A real worker behind a proxy. Its port and the proxy's stay the same over restarts. `command`: without the port's
    settings, which are added."""

    def __init__(self, name: str, logs: Path, *command: str, drain_s: int = 1) -> None:
        port = free_port()
        self.direct = f"http://127.0.0.1:{port}"
        self.proxy = Proxy(port)
        self.child = Child(name, logs, *command, *engine_flags(port, drain_s), env={ENV_WORKER_TOKEN: TOKEN})

    async def start(self) -> None:
        await self.proxy.start()
        await self.child.start()

    async def stop(self) -> None:
        await self.child.stop()
        await self.proxy.stop()


class Workers:
    """Workers on this machine and what can be done to them."""

    faults: tuple[Fault, ...] = FAULTS

    def __init__(self, workers: list[Worker]) -> None:
        self.workers = workers
        self.size = len(workers)
        self._http = aiohttp.ClientSession(headers=_HEADERS, trust_env=False, timeout=aiohttp.ClientTimeout(total=3))
        self._tasks: set[asyncio.Task[None]] = set()
        self._frozen: list[psutil.Process] = []

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._http.close()

    async def get(self, url: str) -> bytes | None:
        """The body of a 200, else None."""
        try:
            async with self._http.get(url) as response:
                return await response.read() if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def post(self, url: str, body: dict[str, Any]) -> int:
        """The answer's status; 0: none came."""
        try:
            async with self._http.post(url, json=body) as response:
                await response.read()
                return response.status
        except (aiohttp.ClientError, OSError, TimeoutError):
            return 0

    async def do(self, what: Fault, worker: int) -> None:
        """See `World`."""
        victim = self.workers[worker]
        match what:
            case "kill":
                victim.child.signal(signal.SIGKILL)
            case "freeze":
                victim.child.signal(signal.SIGSTOP)
            case "blink":
                # Shorter than what a router takes for an end.
                victim.child.signal(signal.SIGSTOP)
                self._later(0.3, victim, signal.SIGCONT)
            case "freeze then kill":
                victim.child.signal(signal.SIGSTOP)
                self._later(0.8, victim, signal.SIGKILL)
            case "drain":
                victim.child.signal(signal.SIGTERM)
            case "lose a rank":
                self._rank(victim).kill()
            case "freeze a rank":
                rank = self._rank(victim)
                self._frozen.append(rank)
                rank.suspend()
            case "cut":
                victim.proxy.cut()
            case "swallow":
                victim.proxy.swallow(in_use_s=0.3)
            case "darken":
                victim.proxy.darken()

    @staticmethod
    def _rank(victim: Worker) -> psutil.Process:
        """One of the worker's processes that is a rank, not the first."""
        children = psutil.Process(victim.child.pid).children(recursive=True)
        ranks = [child for child in children if "wherry_runtime.parallel" in child.cmdline()]
        if not ranks:
            raise RuntimeError(f"{victim.child.name} has no ranks in processes of their own")
        return ranks[-1]

    def _later(self, delay_s: float, victim: Worker, number: int) -> None:
        pid = victim.child.pid

        async def send() -> None:
            await asyncio.sleep(delay_s)
            if victim.child.pid == pid:
                victim.child.signal(number)

        task = asyncio.create_task(send())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def mend(self, worker: int) -> None:
        """See `World`."""
        self.workers[worker].child.signal(signal.SIGCONT)
        self.workers[worker].proxy.mend()
        while self._frozen:
            with contextlib.suppress(psutil.NoSuchProcess):
                self._frozen.pop().resume()


class StaticWorld(Workers):
    """Workers behind proxies, and routers with `--endpoints`: everything on this machine, no control plane."""

    model = MODEL

    def __init__(self, workers: list[Worker], ports: list[int], ranks: int = 1) -> None:
        super().__init__(workers)
        self.faults = RANK_FAULTS if ranks > 1 else FAULTS
        self.routers = [f"http://127.0.0.1:{port}" for port in ports]

    async def healthy(self) -> set[int]:
        """See `World`."""
        numbers = {worker.proxy.url: number for number, worker in enumerate(self.workers)}
        found = set(range(self.size))
        for answer in await asyncio.gather(*(self.get(url + REPORT_PATH) for url in self.routers)):
            replicas = _report(answer).replicas if answer else []
            found &= {numbers[replica.name] for replica in replicas if replica.state == "routable"}
        return found

    async def loads(self) -> dict[str, tuple[int, int]]:
        """See `World`."""
        answers = await asyncio.gather(*(self.get(worker.direct + "/load") for worker in self.workers))
        return {
            worker.child.name: ((load := _load(answer)).running, load.waiting)
            for worker, answer in zip(self.workers, answers, strict=True)
            if answer
        }


@contextlib.asynccontextmanager
async def static_world(
    workers: int = 3, routers: Sequence[Sequence[str]] = ((), ()), ranks: int = 1
) -> AsyncIterator[StaticWorld]:
    """A world whose workers, of so many `ranks` each, are all routable. Gone, with its logs, when the block ends.

    `routers`: flags of each router, beside those that it needs.
    """
    async with contextlib.AsyncExitStack() as stack:
        logs = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="wherry-reliability-")))
        command = [sys.executable, "-m", "wherry_runtime", "--model-uri", f"file://{TINY}"]
        command += [f"--tensor-parallel={ranks}"] if ranks > 1 else []
        made = [Worker(f"worker-{number}", logs, *command) for number in range(workers)]
        for worker in made:
            stack.push_async_callback(worker.stop)
            await worker.start()
        endpoints = ",".join(worker.proxy.url for worker in made)
        ports = [free_port() for _ in routers]
        for number, port in enumerate(ports):
            flags = ["--endpoints", endpoints, "--model", MODEL, "--port", str(port), *routers[number]]
            child = Child(
                f"router-{number}",
                logs,
                *(sys.executable, "-m", "wherry_router", *flags),
                env={ENV_WORKER_TOKEN: TOKEN},
            )
            stack.push_async_callback(child.stop)
            await child.start()
        world = StaticWorld(made, ports, ranks)
        stack.push_async_callback(world.close)

        async def all_there() -> bool:
            return len(await world.healthy()) == workers

        try:
            await until(all_there, "all workers to be routable")
        except AssertionError as error:
            raise AssertionError(f"{error}\n{last_words(logs)}") from None
        yield world
