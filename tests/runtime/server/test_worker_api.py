"""The worker API of a real engine: what it refuses, what it streams, how it ends."""

import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.router.harness import MODEL, TINY, Process, eventually, worker

from wherry_protocol.sse import decode_frame
from wherry_protocol.worker import End, Event, Metrics, Started, Token

TOKEN = {"Authorization": "Bearer worker-secret"}


@pytest.fixture(scope="module")
def one() -> Iterator[Process]:
    """One request at a time, one in the queue, guarded by a token."""
    # On PyTorch, which is slow enough that an answer of hundreds of tokens is still running when the others come.
    args = ("--max-running", "1", "--max-queued", "1", "--backend", "pytorch")
    with worker(*args, env={"WHERRY_WORKER_TOKEN": "worker-secret"}) as process:
        yield process


def execute(process: Process, **change: Any) -> httpx.Response:
    body = {"id": "r1", "model": MODEL, "prompt": {"text": "A boat"}, "sampling": {"max_tokens": 4}} | change
    return httpx.post(process.url + "/execute", json=body, headers=TOKEN, timeout=60)


def events(text: str) -> list[Event]:
    decoded = [decode_frame(frame.encode()) for frame in text.split("\n\n") if frame]
    return [event for event in decoded if event is not None]


def test_events_of_an_answer(one: Process) -> None:
    response = execute(one)
    assert response.headers["content-type"] == "text/event-stream"
    got = events(response.text)
    assert [type(event) for event in got if type(event) is not Token] == [Started, Metrics, End]
    tokens = [event for event in got if isinstance(event, Token)]
    assert sum(len(token.ids) for token in tokens) == got[-1].completion_tokens == 4
    assert [token.index for token in tokens] == sorted(token.index for token in tokens)


def test_correlation_id_in_out_and_in_the_log(one: Process) -> None:
    body = {"id": "r2", "model": MODEL, "prompt": {"text": "A boat"}, "sampling": {"max_tokens": 1}}
    headers = TOKEN | {"X-Correlation-Id": "corr-42"}
    response = httpx.post(one.url + "/execute", json=body, headers=headers, timeout=60)
    assert response.headers["x-correlation-id"] == "corr-42"
    (line,) = [line for line in one.messages("answered") if line["correlation_id"] == "corr-42"]
    assert (line["request_id"], line["completion_tokens"]) == ("r2", 1)


@pytest.mark.parametrize(
    "change, status, code",
    [
        ({"prompt": {"text": ""}}, 400, None),
        ({"prompt": {"token_ids": []}}, 400, None),
        ({"prompt": {}}, 400, None),
        ({"prompt": {"text": "a", "token_ids": [1]}}, 400, None),
        ({"prompt": {"token_ids": [99_999_999]}}, 400, None),
        ({"prompt": {"text": "boat " * 3000}}, 400, "context_length_exceeded"),
        ({"model": "other"}, 404, "model_not_found"),
        ({"prompt": {"text": 5}}, 400, "invalid_request"),
        ({"sampling": {"max_tokens": "x"}}, 400, "invalid_request"),
    ],
)
def test_refusals(one: Process, change: dict[str, Any], status: int, code: str | None) -> None:
    response = execute(one, **change)
    assert response.status_code == status
    assert response.json()["message"]
    assert code in (None, response.json()["code"])
    assert execute(one).status_code == 200, "and it goes on"


@pytest.mark.parametrize("body", [b"", b"{", b"null", b"\x80\x04\x95\x00.", b"[" * 100_000])
def test_bodies_that_are_no_request(one: Process, body: bytes) -> None:
    for path in ("/execute", "/cancel"):
        assert httpx.post(one.url + path, content=body, headers=TOKEN).status_code in (400, 413)


def test_a_body_over_the_cap_is_not_read(one: Process) -> None:
    response = httpx.post(one.url + "/execute", content=b"x" * (17 * 1024 * 1024), headers=TOKEN, timeout=60)
    assert response.status_code == 413


def test_default_deny(one: Process) -> None:
    for path in ("/execute", "/cancel", "/shutdown", "/load", "/nope", "//health", "/health/", "/health/../load"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "worker-secret"}):
            client = httpx.Client(headers=headers)
            request = client.build_request("POST", one.url)
            # httpx would tidy the path.
            request.url = request.url.copy_with(raw_path=path.encode())
            assert client.send(request).status_code == 401, path
            client.close()
    for path in ("/health", "/ready", "/metrics"):
        assert httpx.get(one.url + path).status_code == 200
    assert httpx.get(one.url + "/execute", headers=TOKEN).status_code == 405
    assert httpx.get(one.url + "/nope", headers=TOKEN).status_code == 404
    assert "worker-secret" not in one.log()


class Streaming(threading.Thread):
    """A long answer in another thread."""

    TOKENS = 400

    def __init__(self, process: Process, request_id: str) -> None:
        super().__init__()
        self._process = process
        self._id = request_id
        self.response: httpx.Response | None = None

    def run(self) -> None:
        sampling = {"max_tokens": self.TOKENS, "ignore_eos": True}
        self.response = execute(self._process, id=self._id, sampling=sampling)

    def events(self) -> list[Event]:
        assert self.response is not None
        return events(self.response.text)


def load(process: Process) -> dict[str, Any]:
    return dict(httpx.get(process.url + "/load", headers=TOKEN).json())


def test_full_queue_and_cancel(one: Process) -> None:
    running, waiting = Streaming(one, "running"), Streaming(one, "waiting")
    running.start()
    eventually(lambda: load(one)["running"] == 1)
    waiting.start()
    eventually(lambda: load(one)["waiting"] == 1)
    refused = execute(one, id="third")
    assert refused.status_code == 429
    assert refused.json()["retryable"]
    assert refused.headers["retry-after"]
    for request_id in ("waiting", "running"):
        answer = httpx.post(one.url + "/cancel", json={"id": request_id}, headers=TOKEN)
        assert answer.json() == {"cancelled": True}
    assert httpx.post(one.url + "/cancel", json={"id": "unknown"}, headers=TOKEN).json() == {"cancelled": False}
    for thread in (running, waiting):
        thread.join(20)
    assert running.events()[-1].finish_reason == "cancelled"
    eventually(lambda: load(one)["running"] + load(one)["waiting"] == 0)
    metrics = httpx.get(one.url + "/metrics").text
    assert f'wherry_num_requests_running{{model_name="{MODEL}"}} 0.0' in metrics
    assert 'wherry_request_refused_total{code="429"' in metrics
    assert "wherry_time_to_first_token_seconds_bucket" in metrics


def test_an_answer_begins_when_its_request_is_in_the_queue(one: Process) -> None:
    """And shows signs of life there: who asked can tell a long queue from a dead connection."""
    running = Streaming(one, "running")
    running.start()
    eventually(lambda: load(one)["running"] == 1)
    body = {"id": "waiting", "model": MODEL, "prompt": {"text": "A boat"}, "sampling": {"max_tokens": 1}}
    with httpx.stream("POST", one.url + "/execute", json=body, headers=TOKEN, timeout=60) as response:
        assert load(one)["waiting"] == 1
        assert (response.status_code, response.headers["x-heartbeat-s"]) == (200, "0.3")
        lines = response.iter_lines()
        assert next(lines) == ": alive"
        httpx.post(one.url + "/cancel", json={"id": "running"}, headers=TOKEN)
        assert next(line for line in lines if line.startswith("event:")) == "event: started"
    running.join(20)


def test_a_client_that_leaves_is_cancelled(one: Process) -> None:
    body = {"id": "left", "model": MODEL, "prompt": {"text": "A"}, "sampling": {"max_tokens": 1000, "ignore_eos": True}}
    with httpx.stream("POST", one.url + "/execute", json=body, headers=TOKEN) as response:
        lines = response.iter_lines()
        assert next(lines)
        assert load(one)["running"] == 1
    eventually(lambda: load(one)["running"] == 0, 5)


def test_drain() -> None:
    with worker() as process:
        streaming = Streaming(process, "last")
        streaming.start()
        eventually(lambda: load(process)["running"] == 1)
        process.signal(15)
        state = eventually(lambda: (r := httpx.get(process.url + "/ready")).status_code == 503 and r.json())
        assert state["state"] == "draining"
        late = execute(process, id="late")
        assert (late.status_code, late.json()["retryable"]) == (503, True)
        streaming.join(30)
        assert streaming.events()[-1].completion_tokens == Streaming.TOKENS
        assert process.wait() == 0


def broken_model(path: Path, how: str) -> Path:
    shutil.copytree(TINY, path)
    if how == "truncated":
        weights = path / "model.safetensors"
        weights.write_bytes(weights.read_bytes()[:100_000])
    elif how == "unknown architecture":
        config = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(
            json.dumps(config | {"architectures": ["MambaForCausalLM"], "model_type": "mamba"})
        )
    elif how == "no config":
        (path / "config.json").unlink()
    else:
        shutil.rmtree(path)
    return path


@pytest.mark.parametrize("how", ["missing", "no config", "truncated", "unknown architecture"])
def test_a_model_that_cannot_be_loaded(tmp_path: Path, how: str) -> None:
    """The process ends, and says why where Kubernetes looks for it."""
    path = broken_model(tmp_path / "model", how)
    told = tmp_path / "termination"
    args = ["--model-name", MODEL, "--model-uri", f"file://{path}", "--port", "0"]
    process = Process("wherry_runtime", args, {"WHERRY_TERMINATION_LOG": str(told)})
    assert process.wait(60) == 1
    line = told.read_text()
    assert line.count("\n") == 0
    assert str(path) in line or "Mamba" in line
    assert line in process.log()
    assert "Traceback" not in process.log()
    process.stop()


def test_no_token_and_not_loopback_does_not_start(tmp_path: Path) -> None:
    told = tmp_path / "termination"
    args = ["--model-name", MODEL, "--model-uri", f"file://{TINY}", "--host", "0.0.0.0", "--port", "0"]
    process = Process("wherry_runtime", args, {"WHERRY_TERMINATION_LOG": str(told)})
    assert process.wait(60) == 2
    assert "WHERRY_WORKER_TOKEN" in told.read_text()
    process.stop()


def test_a_taken_port_is_told(one: Process) -> None:
    port = str(urlsplit(one.url).port)
    process = Process("wherry_runtime", ["--model-name", MODEL, "--model-uri", f"file://{TINY}", "--port", port])
    assert process.wait(60) == 2
    assert "choose another with --port" in process.log()
    process.stop()


def test_shutdown_by_request(one: Process) -> None:
    """Ends the shared worker, so it comes last."""
    assert httpx.post(one.url + "/shutdown", headers=TOKEN).status_code == 202
    assert one.wait() == 0
