"""The routers that are compared, each in front of its workers, as they are started."""

import contextlib
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

from benchmarks.engine.peers import python
from tests.reliability.world import TOKEN, Child, Worker, Workers, free_port, until
from tests.router.harness import MODEL, TINY

from wherry_protocol.naming import ENV_WORKER_TOKEN

RUNTIME = (sys.executable, "-m", "wherry_runtime", "--model-uri", f"file://{TINY}")
SERVE = (sys.executable, "-m", "wherry_cli.main", "serve", str(TINY))
# What the peers document for failing workers, set to notice them soon: the defaults look every 60 s and need three
# failures. Retries and circuit breakers are on by default.
_PEER_FLAGS = (
    *("--policy", "round_robin"),
    *("--worker-startup-check-interval", "1"),
    *("--health-check-interval-secs", "1"),
    *("--health-check-timeout-secs", "1"),
    *("--health-failure-threshold", "1"),
    *("--health-success-threshold", "1"),
    *("--retry-max-retries", "5"),
    *("--cb-failure-threshold", "3"),
    *("--cb-timeout-duration-secs", "2"),
)


@dataclass(frozen=True)
class Kind:
    """A router: the workers it needs, how they say that they are ready, and its command for worker URLs and a port."""

    worker: tuple[str, ...]
    ready: str
    router: Callable[[list[str], int], list[str]]


def _wherry(urls: list[str], port: int) -> list[str]:
    flags = ["--endpoints", ",".join(urls), "--model", MODEL, "--port", str(port)]
    return [sys.executable, "-m", "wherry_router", *flags]


def _peer(name: str, module: str) -> Callable[[list[str], int], list[str]]:
    def command(urls: list[str], port: int) -> list[str]:
        own = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        return [str(python(name)), "-m", module, *own, *_PEER_FLAGS, "--worker-urls", *urls]

    return command


KINDS = {
    "Wherry": Kind(RUNTIME, "/ready", _wherry),
    "vllm-router": Kind(SERVE, "/readyz", _peer("vllm-router", "vllm_router.launch_router")),
    "sglang-router": Kind(SERVE, "/readyz", _peer("sglang-router", "sglang_router.launch_router")),
}


class Stack:
    """Workers of one kind. Each measurement gets a router of its own, so that none bears what another did to it."""

    def __init__(self, kind: Kind, workers: Workers, logs: Path) -> None:
        self._kind = kind
        self._logs = logs
        self.workers = workers

    async def well(self) -> None:
        """Returns once every worker is ready."""
        for number in range(self.workers.size):
            await self.workers.mend(number)

        async def ready() -> bool:
            return all([await self.workers.get(w.direct + self._kind.ready) for w in self.workers.workers])

        await until(ready, "all workers to be ready", 90)

    @contextlib.asynccontextmanager
    async def front(self) -> AsyncIterator[str]:
        """The URL for clients; the router is fresh, and knows all workers."""
        urls = [worker.proxy.url for worker in self.workers.workers]
        port = free_port()
        router = Child("router", self._logs, *self._kind.router(urls, port), env={ENV_WORKER_TOKEN: TOKEN})
        await router.start()
        url = f"http://127.0.0.1:{port}"

        async def answers() -> bool:
            return all([await self._chat(url) for _ in range(2 * len(urls))])

        try:
            await until(answers, f"the router to answer; see {router.log_path}", 90)
            yield url
        finally:
            await router.stop()

    async def _chat(self, url: str) -> bool:
        body = {"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        return await self.workers.post(url + "/v1/chat/completions", body) == 200


@contextlib.asynccontextmanager
async def stack(name: str, workers: int, drain_s: int) -> AsyncIterator[Stack]:
    """Workers as `name` needs them. `drain_s`: what running answers get when a worker is told to stop."""
    kind = KINDS[name]
    async with contextlib.AsyncExitStack() as opened:
        logs = Path(opened.enter_context(tempfile.TemporaryDirectory(prefix="wherry-reliability-")))
        made = [Worker(f"worker-{number}", logs, *kind.worker, drain_s=drain_s) for number in range(workers)]
        for worker in made:
            opened.push_async_callback(worker.stop)
            await worker.start()
        machines = Workers(made)
        opened.push_async_callback(machines.close)
        one = Stack(kind, machines, logs)
        await one.well()
        yield one
