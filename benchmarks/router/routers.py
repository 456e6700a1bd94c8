"""The routers that are compared, each started as its documentation says, with one worker process or thread."""

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
from benchmarks.engine import peers
from benchmarks.router.wire import MODEL, Lost, chat, connect
from tests.reliability.world import free_port

START_S = 120
Command = Callable[[list[str], int, Path], list[str]]


def _python(name: str) -> str:
    return str(peers.python(name))


def _program(name: str, program: str) -> str:
    return str(peers.python(name).parent / program)


def _wherry(urls: list[str], port: int, folder: Path) -> list[str]:
    more = ["--max-concurrent", "8192", "--drain-grace-s", "0", "--drain-timeout-s", "1"]
    return [
        sys.executable,
        "-m",
        "wherry_router",
        "--endpoints",
        ",".join(urls),
        "--model",
        MODEL,
        "--port",
        str(port),
        *more,
    ]


def _native(*program: str) -> Command:
    def command(urls: list[str], port: int, folder: Path) -> list[str]:
        own = ["--host", "127.0.0.1", "--port", str(port), "--prometheus-port", str(free_port())]
        return [
            *program,
            *own,
            "--policy",
            "round_robin",
            "--worker-startup-check-interval",
            "1",
            "--worker-urls",
            *urls,
        ]

    return command


def _envoy(urls: list[str], port: int, folder: Path) -> list[str]:
    """One listener, one cluster, HTTP/1.1 on both sides, no access log."""

    def address(url: str) -> dict[str, object]:
        host, _, number = url.removeprefix("http://").partition(":")
        return {"socket_address": {"address": host, "port_value": int(number)}}

    google = "type.googleapis.com/envoy.extensions.filters"
    manager = {
        "@type": f"{google}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "all",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "workers", "timeout": "0s"}}],
                }
            ]
        },
        "http_filters": [
            {"name": "router", "typed_config": {"@type": f"{google}.http.router.v3.Router"}},
        ],
    }
    chain = {"filters": [{"name": "http", "typed_config": manager}]}
    endpoints = [{"endpoint": {"address": address(url)}} for url in urls]
    limits = {"max_connections": 100_000, "max_requests": 100_000, "max_pending_requests": 100_000}
    cluster = {
        "name": "workers",
        "type": "STATIC",
        "lb_policy": "ROUND_ROBIN",
        "circuit_breakers": {"thresholds": [limits]},
        "load_assignment": {"cluster_name": "workers", "endpoints": [{"lb_endpoints": endpoints}]},
    }
    listener = {"name": "in", "address": address(f"http://127.0.0.1:{port}"), "filter_chains": [chain]}
    config = folder / "envoy.json"
    config.write_text(json.dumps({"static_resources": {"listeners": [listener], "clusters": [cluster]}}))
    quiet = ["--log-level", "warning", "--use-dynamic-base-id"]
    return [_program("envoy", "envoy"), "-c", str(config), "--concurrency", "1", *quiet]


def _litellm(urls: list[str], port: int, folder: Path) -> list[str]:
    models = [
        {
            "model_name": MODEL,
            "litellm_params": {"model": f"openai/{MODEL}", "api_base": f"{url}/v1", "api_key": "none"},
        }
        for url in urls
    ]
    config = folder / "litellm.json"  # YAML's subset
    config.write_text(json.dumps({"model_list": models, "litellm_settings": {"telemetry": False}}))
    where = ["--host", "127.0.0.1", "--port", str(port), "--num_workers", "1"]
    return [_program("litellm", "litellm"), "--config", str(config), *where]


ROUTERS: dict[str, Command] = {
    "Wherry": _wherry,
    "vllm-router": lambda *a: _native(_python("vllm-router"), "-m", "vllm_router.launch_router")(*a),
    "sglang-router": lambda *a: _native(_python("sglang-router"), "-m", "sglang_router.launch_router")(*a),
    "smg": lambda *a: _native(_program("smg", "smg"), "launch")(*a),
    "Envoy": _envoy,
    "LiteLLM": _litellm,
}
NATIVE = ("vllm-router", "sglang-router", "smg", "Envoy")


def install(names: list[str]) -> None:
    """Makes the environments of those that have none yet."""
    peers.main([name.lower() for name in names if name != "Wherry"])


@dataclass
class Running:
    """A process that was started here."""

    popen: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def rss_mb(self) -> float:
        """Resident memory of it and its children."""
        root = psutil.Process(self.popen.pid)
        return float(sum(p.memory_info().rss for p in [root, *root.children(recursive=True)])) / 2**20

    def cpu_s(self) -> float:
        """Processor time of it and its children so far."""
        root = psutil.Process(self.popen.pid)
        times = [p.cpu_times() for p in [root, *root.children(recursive=True)]]
        return float(sum(t.user + t.system for t in times))


@contextlib.contextmanager
def process(command: list[str], name: str, folder: Path, cpu: int | None) -> Iterator[Running]:
    """Runs `command`, on one processor if one is named; ends it and all that it started."""
    log = folder / f"{name}.log"
    pinned = ["taskset", "-c", str(cpu), *command] if cpu is not None else command
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WHERRY_")}
    quiet = {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "LITELLM_MODE": "PRODUCTION", "LITELLM_LOG": "ERROR"}
    with log.open("wb") as out:
        popen = subprocess.Popen(
            pinned, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=clean | quiet, start_new_session=True
        )
    try:
        yield Running(popen, log)
    finally:
        popen.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            popen.wait(10)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(popen.pid, signal.SIGKILL)
        popen.wait()


@contextlib.contextmanager
def mocks(folder: Path, replicas: int, interval: float = 0.0, cpu: int | None = None) -> Iterator[list[str]]:
    """Mock workers in a process of their own: their URLs."""
    command = [sys.executable, "-m", "benchmarks.router.mock", "--replicas", str(replicas), "--interval", str(interval)]
    with process(command, "mock", folder, cpu) as running:
        deadline = time.monotonic() + START_S
        while len(urls := running.log.read_text().split()) < replicas:
            if running.popen.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the mock workers do not start: {running.log.read_text()}")
            time.sleep(0.05)
        yield urls


@contextlib.contextmanager
def router(name: str, urls: list[str], folder: Path, cpu: int | None = None) -> Iterator[Running]:
    """A router in front of workers, once it answers."""
    port = free_port()
    with process(ROUTERS[name](urls, port, folder), name, folder, cpu) as running:
        running.url = f"http://127.0.0.1:{port}"
        asyncio.run(_answers(running))
        yield running


async def _answers(running: Running) -> None:
    deadline = time.monotonic() + START_S
    said = ""
    while time.monotonic() < deadline:
        if running.popen.poll() is not None:
            break
        with contextlib.suppress(Lost, TimeoutError):
            connection = await connect(running.url)
            answer = await asyncio.wait_for(connection.ask(chat(1, stream=False)), 10)
            connection.close()
            if answer.status == 200:
                return
            said = f"status {answer.status}"
        await asyncio.sleep(0.3)
    raise RuntimeError(f"{running.log.stem} does not answer ({said}): {running.log.read_text()[-2000:]}")


@contextlib.contextmanager
def workspace() -> Iterator[Path]:
    """A folder for logs and configurations, gone afterwards."""
    with tempfile.TemporaryDirectory(prefix="wherry-router-bench-") as folder:
        yield Path(folder)
