"""`wherry simulate` as a process: the real worker API, behind a real router."""

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from tests.router import harness
from tests.router.certificates import WORKERS, Authority
from tests.router.harness import MODEL, Process
from tests.router.volume import Volume

from wherry_cli.simulated_model import text_of, token_at

ENDLESS = 30_000  # tokens; over a minute of work, which no test waits for
FAST = ("--step-ms", "2", "--prefill-ms", "0.01", "--decode-ms", "0", "--context-us", "0")


def _urls(process: Process) -> list[str]:
    lines = [json.loads(line) for line in process.log().splitlines() if line.startswith("{")]
    return [line["url"] for line in lines if "replica" in line]


@contextlib.contextmanager
def simulated(*args: str, replicas: int = 1) -> Iterator[Process]:
    """Simulated workers in a process, once all of them listen."""
    own = ["simulate", "--port", "0", "--replicas", str(replicas)]

    def ready(process: Process) -> str:
        found = _urls(process)
        if len(found) < replicas:
            return ""
        with contextlib.suppress(httpx.HTTPError):
            path = "/health" if "openai" in args else "/ready"
            return found[0] if all(httpx.get(url + path).status_code == 200 for url in found) else ""
        return ""

    with harness.running(Process("wherry_cli.main", [*own, *args]), ready) as process:
        yield process


def test_mutual_tls_with_a_router(tmp_path: Path) -> None:
    path = Volume(tmp_path / "tls", **Authority().secret()).path
    tls = ("--worker-tls", str(path), "--worker-tls-name", WORKERS)
    own = ["simulate", "--port", "0", *FAST, *tls]
    with (
        harness.running(Process("wherry_cli.main", own), lambda process: "".join(_urls(process))) as worker,
        harness.router(worker.url, args=tls) as front,
    ):
        assert worker.url.startswith("https://")
        chunks = harness.stream(front.url, "Hello", seed=5, max_tokens=9, ignore_eos=True)
        assert harness.text_of(chunks) == expected(5, 9)
        assert f"--worker-tls {path} --worker-tls-name {WORKERS}" in worker.log()


@pytest.mark.parametrize(
    "args", [("--worker-tls", "/x"), ("--worker-tls", "/x", "--worker-tls-name", "x", "--api", "openai")]
)
def test_tls_flags_that_do_not_fit_together(args: tuple[str, ...]) -> None:
    process = Process("wherry_cli.main", ["simulate", "--port", "0", *args])
    assert process.wait(60) == 1
    assert "--worker-tls" in process.log()
    process.stop()


def expected(seed: int, tokens: int) -> str:
    return text_of(token_at(seed, index) for index in range(tokens))


def _resumed(front: Process) -> bool:
    """Whether the router has gone on with a stream that was lost. Perhaps by way of the other replica that is dead."""
    metrics = httpx.get(front.url + "/metrics").text
    return re.search(r'wherry_router_streams_resumed_total\{reason="lost"\} [1-9]', metrics) is not None


def test_a_killed_process_of_replicas_loses_no_token() -> None:
    with (
        simulated(*FAST, replicas=2) as first,
        simulated(*FAST, replicas=2) as second,
        harness.router(*_urls(first), *_urls(second)) as front,
    ):
        text, killed, resumed = "", False, 0
        body = harness.chat("Hello", stream=True, seed=5, max_tokens=ENDLESS, ignore_eos=True)
        with httpx.stream("POST", front.url + "/v1/chat/completions", json=body, timeout=60) as response:
            for chunk in harness.sse(response):
                text += harness.text_of([chunk])
                if text and not killed:
                    loads = [httpx.get(url + "/load").json()["running"] for url in _urls(first)]
                    (first if any(loads) else second).kill()
                    killed = True
                elif killed and not resumed and _resumed(front):
                    resumed = len(text)
                elif resumed and len(text) > 2 * resumed + 1000:
                    break
        assert resumed
        assert expected(5, ENDLESS).startswith(text)


def test_prefixes_are_cached_and_counted() -> None:
    with simulated(*FAST) as worker:
        prompt = {"messages": [{"role": "user", "content": "word " * 400}]}
        for number, cached in ((1, 0), (2, 496)):
            request = {"id": str(number), "model": MODEL, "prompt": prompt, "sampling": {"max_tokens": 2}}
            with httpx.stream("POST", worker.url + "/execute", json=request) as response:
                assert "x-heartbeat-s" in response.headers
                events = list(harness.sse(response))
            assert events[0]["cached_tokens"] == cached
            assert [event["event"] for event in events] == ["started", "token", "token", "metrics", "end"]
        load = httpx.get(worker.url + "/load").json()
        assert load["prefix_hit_tokens_total"] == 496
        assert load["prompt_tokens_total"] == 2 * 505


def test_a_full_queue_is_429_and_a_cancelled_request_ends() -> None:
    with simulated("--step-ms", "20", "--max-running", "1", "--max-queued", "0", "--tokens-per-event", "8") as worker:
        long = {"id": "a", "model": MODEL, "prompt": {"text": "x"}, "sampling": {"ignore_eos": True}}
        with httpx.stream("POST", worker.url + "/execute", json=long, timeout=30) as response:
            events = harness.sse(response)
            assert next(events)["event"] == "started"
            refused = httpx.post(worker.url + "/execute", json={**long, "id": "b"})
            assert (refused.status_code, refused.json()["code"]) == (429, "queue_full")
            assert refused.headers["retry-after"]
            assert httpx.post(worker.url + "/cancel", json={"id": "a"}).json() == {"cancelled": True}
            rest = list(events)
        assert rest[-1]["finish_reason"] == "cancelled"
        assert httpx.get(worker.url + "/load").json()["running"] == 0


@pytest.mark.parametrize(
    "sampling, param",
    [({"stop": ["x"]}, "stop"), ({"logprobs": 1}, "logprobs"), ({"stop_token_ids": [1]}, "stop_token_ids")],
)
def test_what_needs_a_model_is_refused(one: Process, sampling: dict[str, object], param: str) -> None:
    request = {"id": param, "model": MODEL, "prompt": {"text": "x"}, "sampling": sampling}
    refused = httpx.post(one.url + "/execute", json=request)
    assert (refused.status_code, refused.json()["code"], refused.json()["param"]) == (400, "unsupported", param)


@pytest.fixture(scope="module")
def one() -> Iterator[Process]:
    with simulated(*FAST) as worker:
        yield worker


def test_the_openai_api() -> None:
    with simulated(*FAST, "--api", "openai") as server:
        assert httpx.get(server.url + "/v1/models").json()["data"][0]["id"] == MODEL
        body = harness.chat("Hello", seed=9, max_tokens=5, ignore_eos=True)
        answer = harness.post(server.url, body).json()
        assert answer["choices"][0]["message"]["content"] == expected(9, 5)
        assert answer["usage"]["completion_tokens"] == 5
        chunks = harness.stream(server.url, "Hello", seed=9, max_tokens=5, ignore_eos=True)
        assert harness.text_of(chunks) == expected(9, 5)


@pytest.mark.parametrize(
    "args, told",
    [
        (["--kv-tokens", "8"], "--kv-tokens=8 is not one block"),
        (["--max-itl-ratio", "0.5"], "--max-itl-ratio is at least 1"),
        (["--host", "0.0.0.0"], "WHERRY_WORKER_TOKEN"),
    ],
)
def test_wrong_settings_are_told(args: list[str], told: str) -> None:
    process = Process("wherry_cli.main", ["simulate", "--port", "0", *args])
    try:
        assert process.wait() == 1
        assert told in process.log()
    finally:
        process.stop()
