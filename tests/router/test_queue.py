"""Queues in front of workers, as clients see them: real processes."""

import asyncio
import threading
from collections.abc import Iterator
from typing import Any

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
    stream,
    text_of,
    worker,
)

from wherry_protocol.naming import ENV_WORKER_TOKEN
from wherry_protocol.router_report import PATH

CLASSES = (
    "--priority-class=name=high,priority=10",
    "--priority-class=name=mid,default",
    "--priority-class=name=low,priority=-10",
)


class Request(threading.Thread):
    """One request in the background. `order`: where it puts its name when it is answered."""

    def __init__(self, front: Process, name: str, order: list[str], **headers: str) -> None:
        super().__init__(daemon=True)
        self.url, self.named, self.order = front.url, name, order
        self.headers = {key.replace("_", "-"): value for key, value in headers.items()}
        self.answer: httpx.Response | None = None
        self.start()

    def run(self) -> None:
        self.answer = post(self.url, chat(script(tokens=1, text=self.named)), headers=self.headers)
        self.order.append(self.named)

    def done(self) -> httpx.Response:
        self.join(20)
        assert self.answer is not None
        return self.answer


def metrics(front: Process) -> dict[str, float]:
    lines = [line.rsplit(" ", 1) for line in httpx.get(front.url + "/metrics").text.splitlines()]
    return {line[0]: float(line[1]) for line in lines if not line[0].startswith("#")}


def queued(front: Process, class_name: str) -> float:
    return metrics(front)[f'wherry_router_queued_requests{{class="{class_name}"}}']


class Blocked:
    """A router over one worker that takes two requests, of which `hold` keeps both."""

    def __init__(self, front: Process, mock: Mock) -> None:
        self.front, self.mock = front, mock

    def hold(self, class_name: str = "high") -> "list[Held]":
        held = [Held(self.front, class_name) for _ in range(2)]
        eventually(lambda: self.mock.state()["running"] == 2)
        return held


class Held:
    """A stream that goes on until it is let go."""

    def __init__(self, front: Process, class_name: str) -> None:
        self._client = httpx.Client(timeout=30)
        body = chat(script(tokens=2, hold_after=1), stream=True)
        request = self._client.build_request(
            "POST", front.url + "/v1/chat/completions", json=body, headers={"x-wherry-priority": class_name}
        )
        self._response = self._client.send(request, stream=True)
        assert self._response.status_code == 200

    def let_go(self) -> None:
        self._response.close()
        self._client.close()


@pytest.fixture(scope="module")
def blocked() -> Iterator[Blocked]:
    with mock_worker("a", "--max-running", "16") as mock:
        args = (*CLASSES, "--max-per-replica", "2", "--queue-max-requests", "4")
        with router(mock.url, args=args) as front:
            # The router knows what the worker takes.
            yield Blocked(front, mock)


def test_the_higher_class_is_answered_first(blocked: Blocked) -> None:
    held = blocked.hold()
    requests = []
    for name in ("low", "mid", "high"):
        requests.append(Request(blocked.front, name, [], x_wherry_priority=name, x_correlation_id=name))
        eventually(lambda name=name: queued(blocked.front, name) == 1)
    held[0].let_go()
    assert [request.done().status_code for request in requests] == [200] * 3
    held[1].let_go()
    assert blocked.mock.state()["correlation_ids"][-3:] == ["high", "mid", "low"]
    seen = metrics(blocked.front)
    assert seen['wherry_router_queue_wait_seconds_count{class="low"}'] == 1
    assert seen['wherry_router_queue_wait_seconds_sum{class="low"}'] > 0
    assert seen['wherry_router_queued_tokens{class="low"}'] == 0
    eventually(lambda: blocked.mock.state()["running"] == 0)


def test_over_the_bound_the_lowest_class_is_shed(blocked: Blocked) -> None:
    held = blocked.hold()
    order: list[str] = []
    lows = []
    for count in range(1, 5):
        lows.append(Request(blocked.front, f"low{count}", order, x_wherry_priority="low"))
        eventually(lambda count=count: queued(blocked.front, "low") == count)
    refused = post(blocked.front.url, chat("hello"), headers={"x-wherry-priority": "low"})
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1
    high = Request(blocked.front, "high", order, x_wherry_priority="high")
    shed = lows[3].done()
    assert (shed.status_code, shed.json()["error"]["code"], order) == (429, "queue_full", ["low4"])
    assert int(shed.headers["retry-after"]) >= 1
    for one in held:
        one.let_go()
    assert [request.done().status_code for request in (high, *lows[:3])] == [200] * 4
    seen = metrics(blocked.front)
    assert seen['wherry_router_refused_total{class="low",reason="shed"}'] == 1
    assert seen['wherry_router_refused_total{class="low",reason="queue_full"}'] == 1
    eventually(lambda: blocked.mock.state()["running"] == 0)


def test_a_client_says_how_long_it_waits(blocked: Blocked) -> None:
    held = blocked.hold()
    late = post(blocked.front.url, chat("hello"), headers={"x-wherry-queue-timeout-ms": "100"})
    assert (late.status_code, late.json()["error"]["code"]) == (504, "queue_timeout")
    assert 0.1 <= late.elapsed.total_seconds() < 5
    never = post(blocked.front.url, chat("hello"), headers={"x-wherry-queue-timeout-ms": "0"})
    assert (never.status_code, never.json()["error"]["code"]) == (429, "queue_too_slow")
    for one in held:
        one.let_go()
    # A report that was on its way may still count them.
    at_once = {"x-wherry-queue-timeout-ms": "0"}
    eventually(lambda: post(blocked.front.url, chat("hello"), headers=at_once).status_code == 200)


@pytest.mark.parametrize(
    ("headers", "code"),
    [
        ({"x-wherry-priority": "urgent"}, "unknown_priority_class"),
        ({"x-wherry-queue-timeout-ms": "soon"}, "invalid_value"),
        ({"x-wherry-queue-timeout-ms": "-1"}, "invalid_value"),
        ({"x-wherry-queue-timeout-ms": "99999999"}, "invalid_value"),
    ],
)
def test_headers_that_say_nothing_are_refused(blocked: Blocked, headers: dict[str, str], code: str) -> None:
    refused = post(blocked.front.url, chat("hello"), headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
    assert refused.json()["error"]["param"] == next(iter(headers))


async def test_a_client_that_leaves_the_queue_frees_its_place(blocked: Blocked) -> None:
    held = await asyncio.to_thread(blocked.hold)
    async with httpx.AsyncClient() as client:
        url = blocked.front.url + "/v1/chat/completions"
        waiting = [asyncio.create_task(client.post(url, json=chat("hello"), timeout=30)) for _ in range(4)]
        await asyncio.to_thread(eventually, lambda: queued(blocked.front, "mid") == 4)
        for task in waiting:
            task.cancel()
        await asyncio.gather(*waiting, return_exceptions=True)
    await asyncio.to_thread(eventually, lambda: queued(blocked.front, "mid") == 0)
    executed = blocked.mock.state()["executed"]
    for one in held:
        one.let_go()
    await asyncio.to_thread(eventually, lambda: blocked.mock.state()["running"] == 0)
    assert (await asyncio.to_thread(post, blocked.front.url, chat("hello"))).status_code == 200
    assert blocked.mock.state()["executed"] == executed + 1, "none of them came to the worker"


def test_a_model_that_is_starting_is_waited_for() -> None:
    with mock_worker("a", "--token", "token") as mock:
        mock.set(ready=False)
        args = ("--no-replica-wait-s", "20", "--queue-max-requests", "2")
        with router(mock.url, args=args, wait=0, env={ENV_WORKER_TOKEN: "token"}) as front:
            order: list[str] = []
            requests = [Request(front, f"r{i}", order) for i in range(2)]
            eventually(lambda: queued(front, "default") == 2)
            report = httpx.get(front.url + PATH, headers={"authorization": "Bearer token"}).json()
            assert (report["queued"], report["replicas"]) == (2, [])
            refused = post(front.url, chat("hello"))
            assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
            mock.set(ready=True)
            assert [request.done().status_code for request in requests] == [200, 200]


def test_two_routers_share_what_a_worker_takes() -> None:
    now_or_not = {"x-wherry-queue-timeout-ms": "0"}
    with mock_worker("a", "--max-running", "4") as mock, router(mock.url) as one, router(mock.url) as other:
        # Four that run and two that wait there.
        held = [Held(one, "default") for _ in range(6)]
        refused = eventually(lambda: refusal(post(other.url, chat("hello"), headers=now_or_not)))
        assert refused == (429, "queue_too_slow")
        assert refusal(post(one.url, chat("hello"), headers=now_or_not)) == refused
        for stream_held in held:
            stream_held.let_go()
        eventually(lambda: post(other.url, chat("hello"), headers=now_or_not).status_code == 200)


def refusal(response: httpx.Response) -> tuple[int, str] | None:
    if response.status_code == 200:
        return None
    return response.status_code, str(response.json()["error"]["code"])


def test_an_urgent_request_pauses_others_and_their_text_is_whole() -> None:
    with worker("--max-running", "2", "--max-queued", "16") as process, router(process.url, args=CLASSES) as front:
        long: dict[str, Any] = {"max_tokens": 200, "temperature": 0.8, "ignore_eos": True}
        undisturbed = [text_of(stream(front.url, f"Tell story {i}.", seed=i, **long)) for i in range(4)]
        texts: dict[int, str] = {}

        def tell(i: int) -> None:
            texts[i] = text_of(stream(front.url, f"Tell story {i}.", seed=i, **long))

        threads = [threading.Thread(target=tell, args=(i,), daemon=True) for i in range(4)]
        for thread in threads:
            thread.start()
        eventually(lambda: httpx.get(process.url + "/load").json()["running"] == 2)
        for i in range(3):
            urgent = post(front.url, chat(f"{i}?", max_tokens=3), headers={"x-wherry-priority": "high"})
            assert urgent.status_code == 200
        assert not texts, "urgent ones were answered while the others were under way"
        for thread in threads:
            thread.join(60)
        assert httpx.get(process.url + "/load").json()["preemptions_total"] >= 1
        assert [texts[i] for i in range(4)] == undisturbed
