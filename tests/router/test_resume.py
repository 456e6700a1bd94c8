"""Streams whose worker is lost go on with another: what clients see. Mock workers, in processes that really die."""

import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from tests.router.harness import (
    MODEL,
    Mock,
    Process,
    chat,
    eventually,
    mock_worker,
    post,
    router,
    script,
    sse,
    stream,
    text_of,
)


@contextmanager
def cluster(names: str, *flags: str) -> Iterator[tuple[list[Mock], Process]]:
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name)) for name in names]
        yield mocks, stack.enter_context(router(*(mock.url for mock in mocks), args=flags))


@pytest.fixture
def trio() -> Iterator[tuple[list[Mock], Process]]:
    with cluster("abc") as found:
        yield found


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[list[Mock], Process]]:
    """Two workers that survive the tests that use them."""
    with cluster("ab") as found:
        yield found


def running(mocks: list[Mock]) -> Mock:
    """The worker that has a running request, of those that live."""
    living = [mock for mock in mocks if mock.process.popen.poll() is None]
    return eventually(lambda: next((mock for mock in living if mock.state()["running"]), None))


def expected(content: str, tokens: int) -> str:
    return "".join(f"|{content}|{index} " for index in range(tokens))


def numbers(text: str) -> list[int]:
    """Of the tokens in a mock worker's text, in order."""
    return [int(part.split(" ")[0]) for part in text.split("|")[2::2]]


def metric(front: Process, name: str) -> float:
    lines = httpx.get(front.url + "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name))


class Reader(threading.Thread):
    """Reads one stream; `chunks` grows as they come, each with the time it came at."""

    def __init__(self, front: Process, body: dict[str, Any], path: str = "/v1/chat/completions") -> None:
        super().__init__()
        self.chunks: list[dict[str, Any]] = []
        self.times: list[float] = []
        self._front, self._body, self._path = front, body, path
        self.start()

    def run(self) -> None:
        with httpx.stream("POST", self._front.url + self._path, json=self._body, timeout=60) as response:
            for chunk in sse(response):
                self.chunks.append(chunk)
                self.times.append(time.monotonic())

    @property
    def text(self) -> str:
        return text_of(self.chunks)

    def gap(self) -> float:
        return max(after - before for before, after in zip(self.times, self.times[1:], strict=False))


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_stream_goes_on_elsewhere(trio: tuple[list[Mock], Process], how: int) -> None:
    mocks, front = trio
    content = script(tokens=60, pause_s=0.03, named=False)
    reader = Reader(front, chat(content, stream=True, stream_options={"include_usage": True}))
    eventually(lambda: len(numbers(reader.text)) > 5)
    running(mocks).process.signal(how)
    reader.join(20)
    assert reader.text == expected(content, 60)
    assert reader.chunks[-1] == {}
    assert reader.chunks[-2]["usage"]["completion_tokens"] == 60
    assert reader.gap() < 2.0
    assert sum(len(mock.state()["resumed_at"]) for mock in mocks if mock is not victim_of(mocks, how)) == 1
    reason = "lost" if how == signal.SIGKILL else "frozen"
    assert metric(front, f'wherry_router_streams_resumed_total{{reason="{reason}"}}') == 1
    assert metric(front, "wherry_router_resume_gap_seconds_count") == 1
    assert metric(front, "wherry_router_streams_lost_total") == 0


def victim_of(mocks: list[Mock], how: int) -> Mock:
    """Whoever does not answer: killed, or stopped."""
    if how == signal.SIGKILL:
        return next(mock for mock in mocks if mock.process.popen.poll() is not None)
    for mock in mocks:
        try:
            httpx.get(mock.url + "/health", timeout=0.5)
        except httpx.TimeoutException:
            return mock
    raise AssertionError("none is stopped")


def test_one_stream_survives_several_losses() -> None:
    with cluster("abcde") as (mocks, front):
        content = script(tokens=200, pause_s=0.03, named=False)
        reader = Reader(front, chat(content, stream=True))
        for number, how in enumerate((signal.SIGKILL, signal.SIGSTOP, signal.SIGKILL)):
            eventually(lambda n=number: len(numbers(reader.text)) > 12 * (n + 1))
            alive = [mock for mock in mocks if mock.process.popen.poll() is None]
            stopped = {mock.name for mock in alive if not answers(mock)}
            running([mock for mock in alive if mock.name not in stopped]).process.signal(how)
        reader.join(30)
        assert reader.text == expected(content, 200)
        assert reader.chunks[-1] == {}
        assert metric(front, "wherry_router_streams_resumed_total") == 3


def answers(mock: Mock) -> bool:
    try:
        return httpx.get(mock.url + "/health", timeout=0.5).status_code == 200
    except httpx.HTTPError:
        return False


def ask_until_resumed(mocks: list[Mock], front: Process, content: str, text: str, *, streamed: bool) -> None:
    """Asks again and again, since the router leaves out a worker that failed lately; every answer is `text`."""
    before = sum(len(mock.state()["resumed_at"]) for mock in mocks)

    def resumed() -> bool:
        if streamed:
            assert text_of(stream(front.url, content)) == text
        else:
            assert post(front.url, chat(content)).json()["choices"][0]["message"]["content"] == text
        return sum(len(mock.state()["resumed_at"]) for mock in mocks) > before

    eventually(resumed, 40)


@pytest.mark.parametrize("streamed", [True, False])
@pytest.mark.parametrize("fault", ["cut_after", "skip_after", "repeat_after", "garbage_after"])
def test_what_a_worker_tells_wrongly_never_reaches_the_client(
    pair: tuple[list[Mock], Process], fault: str, streamed: bool
) -> None:
    """A token left out or told twice is noticed, and the answer goes on where it was right."""
    mocks, front = pair
    content = script(tokens=6, only="a", named=False, **{fault: 3})
    ask_until_resumed(mocks, front, content, expected(content, 6), streamed=streamed)


@pytest.mark.parametrize("streamed", [True, False])
def test_an_error_that_may_be_tried_elsewhere_is(pair: tuple[list[Mock], Process], streamed: bool) -> None:
    mocks, front = pair
    content = script(tokens=6, only="a", named=False, error_after=2, retryable=True)
    ask_until_resumed(mocks, front, content, expected(content, 6), streamed=streamed)


def test_choices_and_completions_go_on_each_for_itself(trio: tuple[list[Mock], Process]) -> None:
    mocks, front = trio
    prompts = [script(tokens=40, pause_s=0.03, named=False), script(tokens=30, pause_s=0.03, named=False)]
    body = {"model": MODEL, "prompt": prompts, "n": 3, "stream": True, "logprobs": 0}
    reader = Reader(front, body, "/v1/completions")
    eventually(lambda: len(reader.chunks) > 20)
    running(mocks).process.kill()
    reader.join(20)
    assert reader.chunks[-1] == {}
    for choice in range(6):
        mine = [c for chunk in reader.chunks for c in chunk.get("choices", []) if c["index"] == choice]
        assert "".join(c["text"] for c in mine) == expected(prompts[choice // 3], 40 if choice < 3 else 30)
        assert mine[-1]["finish_reason"] == "stop"


def test_an_answer_that_was_whole_only_ends(pair: tuple[list[Mock], Process]) -> None:
    """The worker is lost between the last token and the end."""
    mocks, front = pair
    content = script(tokens=4, only="a", named=False, repeat_after=3)
    ask_until_resumed(mocks, front, content, expected(content, 4), streamed=True)
    assert 4 in [at for mock in mocks for at in mock.state()["resumed_at"]]


def test_a_request_that_ends_every_worker_is_stopped() -> None:
    with cluster("abcdefgh") as (mocks, front):
        chunks = stream(front.url, script(tokens=9, exit_after=3, named=False))
        assert chunks[-1]["error"]["code"] == "resume_failed"
        assert numbers(text_of(chunks)) == [0, 1, 2]
        # The one that began, and four tries.
        eventually(lambda: sum(mock.process.popen.poll() is not None for mock in mocks) == 5)
        assert metric(front, "wherry_router_streams_lost_total") == 1
        assert post(front.url, chat("hello")).status_code == 200


@pytest.mark.parametrize("fields", [{"refuse_resume": True}, {"forget_resume": True}])
def test_workers_that_cannot_go_on_end_the_answer_with_an_error(
    pair: tuple[list[Mock], Process], fields: dict[str, bool]
) -> None:
    """As those of another model do, or those of an older version: never a wrong text, never a client's fault."""
    _, front = pair
    content = script(tokens=6, cut_after=2, named=False, **fields)
    chunks = stream(front.url, content)
    assert chunks[-1]["error"]["code"] == "resume_failed"
    assert text_of(chunks) == expected(content, 2)
    response = post(front.url, chat(content))
    assert (response.status_code, response.json()["error"]["code"]) == (503, "resume_failed")


def test_without_a_spare_replica_the_stream_waits_for_its_own() -> None:
    with cluster("a") as (mocks, front):
        content = script(tokens=40, pause_s=0.03, named=False)
        reader = Reader(front, chat(content, stream=True))
        eventually(lambda: len(numbers(reader.text)) > 5)
        mocks[0].process.signal(signal.SIGSTOP)
        eventually(lambda: front.messages("try failed"))
        mocks[0].process.signal(signal.SIGCONT)
        reader.join(20)
        assert reader.text == expected(content, 40)
        assert reader.chunks[-1] == {}


def test_nobody_comes_back_and_the_stream_ends_in_time() -> None:
    with cluster("a", "--resume-wait-s", "1.5") as (mocks, front):
        reader = Reader(front, chat(script(tokens=9, hold_after=2, named=False), stream=True))
        eventually(lambda: numbers(reader.text) == [0, 1])
        began = time.monotonic()
        mocks[0].process.kill()
        reader.join(20)
        assert reader.chunks[-1]["error"]["code"] == "resume_timeout"
        assert 1.0 < time.monotonic() - began < 4.0
        assert metric(front, "wherry_router_streams_lost_total") == 1


def test_a_client_that_leaves_while_its_answer_waits_is_noticed() -> None:
    with cluster("a") as (mocks, front):
        data = json.dumps(chat(script(tokens=9, hold_after=2), stream=True)).encode()
        address = urlsplit(front.url)
        with socket.create_connection((address.hostname, address.port)) as connection:
            head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(data)
            connection.sendall(head + data)
            running(mocks)
            received = b""
            while b"|1 " not in received:
                received += connection.recv(1000)
            mocks[0].process.kill()
            eventually(lambda: front.messages("try failed"))
            assert metric(front, "wherry_router_requests_in_flight") == 1
        eventually(lambda: metric(front, "wherry_router_requests_in_flight") == 0, 5)
        assert metric(front, "wherry_router_outstanding_tokens") == 0


def test_fifty_streams_of_a_lost_worker_all_go_on(trio: tuple[list[Mock], Process]) -> None:
    mocks, front = trio
    content = script(tokens=40, pause_s=0.05, named=False)
    readers = [Reader(front, chat(content, stream=True)) for _ in range(50)]
    eventually(lambda: all(len(numbers(reader.text)) > 2 for reader in readers), 30)
    mocks[0].process.kill()
    for reader in readers:
        reader.join(30)
        assert reader.text == expected(content, 40)
        assert reader.chunks[-1] == {}
    assert metric(front, "wherry_router_streams_resumed_total") >= 10


def test_a_slow_worker_keeps_its_stream(pair: tuple[list[Mock], Process]) -> None:
    """Its tokens are much further apart than the silence after which the router asks, and it answers."""
    _, front = pair
    failed = len(front.messages("try failed"))
    content = script(tokens=3, pause_s=1.6, named=False)
    assert text_of(stream(front.url, content)) == expected(content, 3)
    assert len(front.messages("try failed")) == failed
