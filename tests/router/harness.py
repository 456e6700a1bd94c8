"""Real processes for tests: mock workers, real workers, routers. Each listens on a port of its own choosing."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import httpx

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "examples" / "models" / "tiny"
MODEL = "chat"
T = TypeVar("T")


def eventually(probe: Callable[[], T], timeout_s: float = 20.0) -> T:
    """The first true value of `probe`; fails with the last one when time runs out."""
    deadline = time.monotonic() + timeout_s
    while not (value := probe()):
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout_s} s: {value!r}")
        time.sleep(0.02)
    return value


class Process:
    """A child process whose log is in a file."""

    def __init__(self, module: str, args: list[str], env: dict[str, str] | None = None) -> None:
        self.log_path = Path(tempfile.mkstemp(prefix="wherry-test-", suffix=".log")[1])
        self.url = ""
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("WHERRY_", "POD_"))}
        environment |= {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "COLUMNS": "200"} | (env or {})
        with self.log_path.open("wb") as log:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", module, *args],
                cwd=ROOT,
                env=environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def log(self) -> str:
        return self.log_path.read_text()

    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.log().splitlines() if line.startswith("{")]

    def messages(self, message: str) -> list[dict[str, Any]]:
        return [line for line in self.lines() if line["message"] == message]

    def signal(self, number: int) -> None:
        self.popen.send_signal(number)

    def kill(self) -> None:
        self.popen.kill()
        self.popen.wait(10)

    def wait(self, timeout_s: float = 20) -> int:
        return self.popen.wait(timeout_s)

    def find(self, read: Callable[["Process"], str], timeout_s: float = 60) -> str:
        def probe() -> str:
            if self.popen.poll() is not None:
                raise AssertionError(f"ended with {self.popen.returncode}: {self.log()}")
            return read(self)

        return eventually(probe, timeout_s)

    def stop(self) -> None:
        if self.popen.poll() is None:
            self.popen.send_signal(signal.SIGCONT)
            self.popen.terminate()
            try:
                self.popen.wait(10)
            except subprocess.TimeoutExpired:
                self.kill()
        self.log_path.unlink(missing_ok=True)


def _listening(process: Process) -> str:
    lines = process.messages("listening")
    return str(lines[0]["url"]) if lines else ""


@contextlib.contextmanager
def running(process: Process, read_url: Callable[[Process], str] = _listening) -> Iterator[Process]:
    try:
        process.url = process.find(read_url)
        yield process
    finally:
        process.stop()


class Mock:
    """A mock worker and what it has seen."""

    def __init__(self, process: Process, name: str) -> None:
        self.process = process
        self.name = name
        self.url = process.url

    def state(self) -> dict[str, Any]:
        return dict(httpx.get(self.url + "/mock", timeout=5).json())

    def set(self, **change: Any) -> None:
        httpx.post(self.url + "/mock", json=change, timeout=5)


@contextlib.contextmanager
def mock_worker(name: str, *args: str) -> Iterator[Mock]:
    def read(process: Process) -> str:
        return next((line for line in process.log().splitlines() if line.startswith(("http://", "https://"))), "")

    with running(Process("tests.router.mock_worker", ["--name", name, *args]), read) as process:
        yield Mock(process, name)


@contextlib.contextmanager
def router(
    *urls: str, args: tuple[str, ...] = (), env: dict[str, str] | None = None, wait: int | None = None
) -> Iterator[Process]:
    """A router over `urls`, once it knows `wait` of them (all, by default) as routable."""
    base = ["--endpoints", ",".join(urls), "--model", MODEL, "--port", "0", "--drain-grace-s", "0"]
    with running(Process("wherry_router", [*base, *args], env)) as process:
        want = len(urls) if wait is None else wait
        eventually(lambda: any(len(line["routable"]) >= want for line in process.messages("replicas")))
        yield process


@contextlib.contextmanager
def worker(*args: str, env: dict[str, str] | None = None, uri: str = "") -> Iterator[Process]:
    """A real worker with the sample model, loaded."""
    base = [
        "--model-name",
        MODEL,
        "--model-uri",
        uri or f"file://{TINY}",
        "--port",
        "0",
        "--threads",
        "1",
        "--dtype",
        "float32",
    ]
    with running(Process("wherry_runtime", [*base, *args], env)) as process:
        eventually(lambda: any(line.get("state") == "ready" for line in process.messages("state")), 60)
        yield process


@contextlib.contextmanager
def workers(count: int, *args: str, uri: str = "") -> Iterator[list[Process]]:
    """Several of them, which load side by side."""
    with contextlib.ExitStack() as stack, ThreadPoolExecutor(count) as pool:
        starting = [worker(*args, uri=uri) for _ in range(count)]
        yield list(pool.map(stack.enter_context, starting))


@contextlib.contextmanager
def serve(*args: str, env: dict[str, str] | None = None, model: str = str(TINY)) -> Iterator[Process]:
    """`wherry serve`, with the sample model where no other is named."""

    def read(process: Process) -> str:
        marks = [word for word in process.log().split() if word.startswith("http://") and word.endswith("/v1")]
        return marks[0].removesuffix("/v1") if marks else ""

    base = ["serve", model, "--port", "0", "--model-name", MODEL, "--threads", "1", "--dtype", "float32"]
    with running(Process("wherry_cli.main", [*base, *args], env), read) as process:
        yield process


def chat(content: str, **more: Any) -> dict[str, Any]:
    return {"model": MODEL, "messages": [{"role": "user", "content": content}], **more}


def script(**fields: Any) -> str:
    """A prompt that tells mock workers what to do."""
    return json.dumps(fields)


def post(url: str, body: Any, timeout: float = 30, **more: Any) -> httpx.Response:
    return httpx.post(url + "/v1/chat/completions", json=body, timeout=timeout, **more)


def sse(response: httpx.Response) -> Iterator[dict[str, Any]]:
    """The chunks of a streamed answer; the last one is {} for `[DONE]`."""
    for line in response.iter_lines():
        if line.startswith("data: "):
            yield {} if line == "data: [DONE]" else json.loads(line[6:])


def text_of(chunks: list[dict[str, Any]]) -> str:
    return "".join(c["delta"].get("content") or "" for chunk in chunks for c in chunk.get("choices", []))


def stream(url: str, content: str, timeout: float = 60, key: str = "", **more: Any) -> list[dict[str, Any]]:
    """All chunks of one streamed answer."""
    body = chat(content, stream=True, **more)
    headers = {"authorization": f"Bearer {key}"} if key else None
    with httpx.stream("POST", url + "/v1/chat/completions", json=body, timeout=timeout, headers=headers) as response:
        if response.status_code != 200:
            raise AssertionError(f"{response.status_code}: {response.read()!r}")
        return list(sse(response))
