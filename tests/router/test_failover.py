"""Workers that fail, in real processes: what clients see."""

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import ExitStack

import httpx
import pytest
from tests.router.harness import (
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


@pytest.fixture
def trio() -> Iterator[tuple[list[Mock], Process]]:
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name)) for name in "abc"]
        yield mocks, stack.enter_context(router(*(mock.url for mock in mocks)))


@pytest.fixture(scope="module")
def shared_pair() -> Iterator[tuple[list[Mock], Process]]:
    """Two workers that survive the tests that use them."""
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name)) for name in "ab"]
        yield mocks, stack.enter_context(router(*(mock.url for mock in mocks)))


@pytest.fixture
def pair(shared_pair: tuple[list[Mock], Process]) -> tuple[list[Mock], Process]:
    """The two with nothing held against either: faults of an earlier test are forgotten, whatever it was."""
    _, front = shared_pair

    def well() -> bool:
        post(front.url, chat("hello"))  # a first token closes a breaker, a probe alone does so late
        return 'wherry_router_breakers{state="closed"} 2.0' in httpx.get(front.url + "/metrics").text

    eventually(well)
    return shared_pair


def holder(mocks: list[Mock]) -> Mock:
    """The worker that has a running request."""
    return eventually(lambda: next((mock for mock in mocks if mock.state()["running"]), None))


class Background(threading.Thread):
    """One streamed request in another thread."""

    def __init__(self, url: str, content: str, **more: object) -> None:
        super().__init__()
        self.chunks: list[dict[str, object]] = []
        self.error: Exception | None = None
        self._args = url, content, more

    def run(self) -> None:
        url, content, more = self._args
        try:
            self.chunks = stream(url, content, **more)  # type: ignore[arg-type]
        except Exception as error:
            self.error = error


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_a_worker_lost_before_its_first_token_costs_no_request(trio: tuple[list[Mock], Process], how: int) -> None:
    mocks, front = trio
    victim, request = None, None
    while victim is None:
        # "a" holds the request; where another got it, it is answered, and the turn comes to "a".
        request = Background(front.url, script(hold=True, only="a", tokens=3))
        request.start()
        eventually(lambda r=request: not r.is_alive() or mocks[0].state()["running"])
        victim = mocks[0] if mocks[0].state()["running"] else None
    victim.process.signal(how)
    request.join(20)
    assert request.error is None
    assert request.chunks[-1] == {}
    assert text_of(request.chunks).count("|") == 6
    assert front.messages("try failed")[-1]["reason"] in ("lost", "frozen")
    # Later requests avoid it: none waits for it again.
    for _ in range(6):
        assert post(front.url, chat("hello"), timeout=5).status_code == 200


@pytest.mark.parametrize("streamed", [True, False])
def test_a_connection_that_is_dead_before_the_first_byte_costs_no_request(
    pair: tuple[list[Mock], Process], streamed: bool
) -> None:
    mocks, front = pair
    before = len(front.messages("try failed"))
    content = script(mute=True, only="a", tokens=3)
    while len(front.messages("try failed")) == before:
        if streamed:
            assert stream(front.url, content, timeout=20)[-1] == {}
        else:
            assert post(front.url, chat(content), timeout=20).status_code == 200
    (line,) = front.messages("try failed")[before:]
    assert (line["reason"], line["detail"]) == ("lost", "lost: the connection is silent though the worker is well")
    eventually(lambda: mocks[0].state()["running"] == 0)


def test_refused_connections_cost_no_request(trio: tuple[list[Mock], Process]) -> None:
    mocks, front = trio
    mocks[0].process.kill()
    mocks[1].process.kill()
    for _ in range(5):
        answer = post(front.url, chat("hello")).json()
        assert answer["choices"][0]["message"]["content"].startswith("c|hello|0")


def test_all_workers_gone_is_503_with_retry_after(trio: tuple[list[Mock], Process]) -> None:
    mocks, front = trio
    for mock in mocks:
        mock.process.kill()
    response = post(front.url, chat("hello"))
    assert response.status_code == 503
    assert response.headers["retry-after"]
    assert response.json()["error"]["code"] == "no_replica"


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_without_resume_a_stream_ends_with_its_worker(how: int) -> None:
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name)) for name in "ab"]
        front = stack.enter_context(router(*(mock.url for mock in mocks), args=("--no-resume",)))
        body = chat(script(tokens=9, hold_after=2), stream=True)
        with httpx.stream("POST", front.url + "/v1/chat/completions", json=body, timeout=20) as response:
            chunks = sse(response)
            seen = [next(chunks) for _ in range(3)]
            holder(mocks).process.signal(how)
            seen += list(chunks)
        assert text_of(seen[:-1]).count("|") == 4
        assert seen[-1]["error"]["code"] == "worker_lost"
        metrics = httpx.get(front.url + "/metrics").text
        assert "wherry_router_streams_lost_total 1.0" in metrics
        # Of a whole answer the client has nothing yet, so it begins anew.
        alive = next(mock for mock in mocks if mock.process.popen.poll() is None)
        content = script(tokens=4, exit_after=2, only=alive.name)
        if how == signal.SIGKILL:
            assert post(front.url, chat(content)).status_code == 503, "nobody is left"


@pytest.mark.parametrize("flags", [(), ("--no-resume",)])
def test_a_whole_answer_survives_a_worker_lost_midway(flags: tuple[str, ...]) -> None:
    """It goes on elsewhere, or begins anew where that is off, and nothing is doubled."""
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name)) for name in "abc"]
        front = stack.enter_context(router(*(mock.url for mock in mocks), args=flags))
        check_whole_answers(mocks, front)


def check_whole_answers(mocks: list[Mock], front: Process) -> None:
    content = script(tokens=4, exit_after=2, only="a")
    for _ in range(3):
        message = post(front.url, chat(content)).json()["choices"][0]["message"]["content"]
        assert message.count("|0 ") == 1
        assert message.count("|3 ") == 1
    assert mocks[0].process.wait() == 3


def test_a_slow_worker_is_not_taken_for_a_frozen_one(pair: tuple[list[Mock], Process]) -> None:
    _, front = pair
    before = front.messages("try failed")
    # Many times the silence after which the router asks; the worker is alive and says so.
    assert text_of(stream(front.url, script(tokens=2, pause_s=2.0))).count("|") == 4
    assert front.messages("try failed") == before


@pytest.mark.parametrize("status, code", [(400, "context_length_exceeded"), (404, "model_not_found")])
def test_a_4xx_is_never_tried_elsewhere(pair: tuple[list[Mock], Process], status: int, code: str) -> None:
    mocks, front = pair
    before = sum(mock.state()["executed"] for mock in mocks)
    response = post(front.url, chat(script(status=status, code=code)))
    assert response.status_code == status
    assert response.json()["error"]["code"] == code
    assert sum(mock.state()["executed"] for mock in mocks) == before + 1


def test_a_full_queue_is_tried_elsewhere_then_told(pair: tuple[list[Mock], Process]) -> None:
    mocks, front = pair
    before = sum(mock.state()["executed"] for mock in mocks)
    response = post(front.url, chat(script(status=429, code="queue_full")))
    assert response.status_code == 429
    assert response.json()["error"] == {
        "message": response.json()["error"]["message"],
        "type": "rate_limit_error",
        "param": None,
        "code": "queue_full",
    }
    assert response.headers["retry-after"] == "3"
    assert sum(mock.state()["executed"] for mock in mocks) == before + 2, "each replica once"
    for _ in range(4):
        assert post(front.url, chat(script(status=429, only="a"))).status_code == 200


@pytest.mark.parametrize("status", [500, 503])
def test_a_5xx_is_tried_once_on_each_replica(pair: tuple[list[Mock], Process], status: int) -> None:
    mocks, front = pair
    before = [mock.state()["executed"] for mock in mocks]
    assert post(front.url, chat(script(status=status))).status_code == 503
    assert [mock.state()["executed"] for mock in mocks] == [count + 1 for count in before]


def test_an_error_event_and_garbage_reach_the_client_as_errors(pair: tuple[list[Mock], Process]) -> None:
    _, front = pair
    assert stream(front.url, script(error_after=2))[-1]["error"]["message"] == "it broke"
    assert stream(front.url, script(garbage_after=2))[-1]["error"]["code"] == "resume_failed"
    response = post(front.url, chat(script(error_after=2)))
    assert (response.status_code, response.json()["error"]["code"]) == (500, "broken")


def test_a_worker_that_becomes_unready_gets_no_requests(pair: tuple[list[Mock], Process]) -> None:
    mocks, front = pair
    mocks[0].set(ready=False)
    eventually(lambda: len(front.messages("replicas")[-1]["routable"]) == 1)
    before = mocks[0].state()["executed"]
    for _ in range(4):
        assert post(front.url, chat("hello")).status_code == 200
    assert mocks[0].state()["executed"] == before
    mocks[0].set(ready=True)
    eventually(lambda: len(front.messages("replicas")[-1]["routable"]) == 2)


def test_a_wrong_worker_token_is_no_fault_of_the_client() -> None:
    with mock_worker("a", "--token", "right") as mock:
        with router(mock.url, env={"WHERRY_WORKER_TOKEN": "wrong"}) as front:
            assert post(front.url, chat("hello")).status_code == 503
        with router(mock.url, env={"WHERRY_WORKER_TOKEN": "right"}) as front:
            assert post(front.url, chat("hello")).status_code == 200
            assert "right" not in json.dumps(front.lines())
