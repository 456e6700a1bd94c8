"""Limits over real sockets: two routers that count together in a real Redis, which dies and freezes."""

import json
import signal
import socket
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import NamedTuple
from urllib.parse import urlsplit

import httpx
import pytest
from tests.router.harness import Mock, Process, chat, eventually, mock_worker, post, router, script
from tests.router.redis_server import Server
from tests.router.volume import Volume

TOKEN = "worker-token-0123456789"


def key(name: str) -> str:
    return f"wk-{name}-0123456789abcdef"


def entry(name: str, limits: str) -> str:
    return f"key: {key(name)}\nlimits: {{{limits}}}"


LIMITS = {
    "rpm": "requestsPerMinute: 10",
    "tpm": "tokensPerMinute: 2000",
    "conc": "concurrent: 3",
    "left": "tokensPerMinute: 1000",
    "lost": "requestsPerMinute: 20",
    "frozen": "requestsPerMinute: 20",
    "back": "requestsPerMinute: 4",
    "free": "",
}


class Fronts(NamedTuple):
    routers: tuple[Process, Process]
    mock: Mock
    redis: Server


@pytest.fixture(scope="module")
def fronts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fronts]:
    with ExitStack() as stack:
        redis = Server()
        stack.callback(redis.stop)
        entries = {f"{name}.yaml": entry(name, text) for name, text in LIMITS.items()}
        volume = Volume(tmp_path_factory.mktemp("limits") / "keys", **entries)
        mock = stack.enter_context(mock_worker("a", "--token", TOKEN))
        args = ("--api-keys", str(volume.path), "--limit-routers", "2")
        env = {"WHERRY_WORKER_TOKEN": TOKEN, "WHERRY_REDIS_URL": redis.url}
        one, two = (stack.enter_context(router(mock.url, args=args, env=env)) for _ in range(2))
        yield Fronts((one, two), mock, redis)


def bearer(name: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key(name)}"}


def burst(fronts: Fronts, name: str, count: int, content: str = "hello", **more: object) -> list[httpx.Response]:
    def one(n: int) -> httpx.Response:
        return post(fronts.routers[n % 2].url, chat(content, **more), headers=bearer(name))

    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(one, range(count)))


def statuses(responses: list[httpx.Response]) -> Counter[int]:
    return Counter(response.status_code for response in responses)


def test_two_routers_let_no_more_requests_in_than_one_limit(fronts: Fronts) -> None:
    responses = burst(fronts, "rpm", 40)
    assert statuses(responses) == {200: 10, 429: 30}
    for response in responses:
        assert response.headers["x-ratelimit-limit-requests"] == "10"
        if response.status_code == 429:
            assert response.json()["error"]["code"] == "rate_limit_exceeded"
            assert 1 <= int(response.headers["retry-after"]) <= 61
            assert response.headers["x-ratelimit-remaining-requests"] == "0"


def test_two_routers_let_no_more_tokens_in_than_one_limit(fronts: Fronts) -> None:
    content = script(tokens=100, text="x")
    responses = burst(fronts, "tpm", 60, content, max_tokens=100)
    used = [r.json()["usage"]["total_tokens"] for r in responses if r.status_code == 200]
    assert set(statuses(responses)) == {200, 429}
    assert sum(used) <= 2000
    # What was reserved and not used is given to others.
    last = post(fronts.routers[0].url, chat("{}", max_tokens=1), headers=bearer("tpm"))
    assert int(last.headers["x-ratelimit-remaining-tokens"]) <= 2000 - sum(used)


def test_no_more_at_a_time_than_may_be_and_places_come_back_when_clients_leave(fronts: Fronts) -> None:
    def begin(n: int, stack: ExitStack) -> int:
        body = chat(script(tokens=3, hold_after=1, text="x"), stream=True)
        url = fronts.routers[n % 2].url + "/v1/chat/completions"
        response = stack.enter_context(httpx.stream("POST", url, json=body, headers=bearer("conc"), timeout=30))
        return response.status_code

    with ExitStack() as streams:
        assert [begin(n, streams) for n in range(5)] == [200, 200, 200, 429, 429]
    eventually(lambda: post(fronts.routers[1].url, chat("x"), headers=bearer("conc")).status_code == 200)


def test_who_waits_in_the_queue_has_a_place_and_over_the_limit_nobody_waits() -> None:
    """A request is one of those at a time from when it is let in, so that none is told 429 after it has waited."""

    def send(front: Process) -> socket.socket:
        address = urlsplit(front.url)
        body = json.dumps(chat(script(tokens=3, hold_after=1), stream=True)).encode()
        connection = socket.create_connection((address.hostname, address.port))
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        return connection

    def waiting(front: Process) -> float:
        text = httpx.get(front.url + "/metrics").text
        return float(text.partition('wherry_router_queued_requests{class="default"} ')[2].split()[0])

    with ExitStack() as stack:
        mock = stack.enter_context(mock_worker("a", "--max-running", "1"))
        front = stack.enter_context(router(mock.url, args=("--limit-total", "concurrent=8")))
        sent = [stack.enter_context(send(front)) for _ in range(8)]
        queued = eventually(lambda: mock.state()["running"] + waiting(front) == 8 and waiting(front))
        assert queued >= 2
        refused = post(front.url, chat("hello"))
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert waiting(front) == queued
        # One that waits leaves: its place is free at once, and whoever comes next waits in its stead.
        sent[-1].close()
        eventually(lambda: waiting(front) == queued - 1)
        stack.enter_context(send(front))
        eventually(lambda: waiting(front) == queued)


def test_a_client_that_leaves_pays_for_what_it_got(fronts: Fronts) -> None:
    """It reserved more than 800 of 1000 tokens; while it runs there is no room, and afterwards there is."""
    body = chat(script(tokens=50, hold_after=20, text="x"), stream=True, max_tokens=800)
    small = chat("{}", max_tokens=100)
    url = fronts.routers[0].url + "/v1/chat/completions"
    with httpx.stream("POST", url, json=body, headers=bearer("left"), timeout=30) as response:
        lines = response.iter_lines()
        for _ in range(40):
            next(lines)
        assert post(fronts.routers[1].url, {**small, "max_tokens": 300}, headers=bearer("left")).status_code == 429
    eventually(
        lambda: post(fronts.routers[1].url, {**small, "max_tokens": 300}, headers=bearer("left")).status_code == 200
    )


def test_usage_is_told_to_whoever_has_the_worker_token(fronts: Fronts) -> None:
    assert post(fronts.routers[0].url, chat("hello"), headers=bearer("free")).status_code == 200
    url = fronts.routers[0].url + "/internal/usage"
    assert httpx.get(url, headers=bearer("free")).status_code == 401
    report = httpx.get(url, headers={"Authorization": f"Bearer {TOKEN}"}).json()
    found = {t["tenant"]: t for t in report["tenants"]}["free"]
    assert (found["requests"], found["completion_tokens"]) == (1, 4)
    assert found["prompt_tokens"] > 0
    metrics = httpx.get(fronts.routers[0].url + "/metrics").text
    assert 'wherry_router_tenant_tokens_total{kind="completion",tenant="free"} 4.0' in metrics
    assert key("free") not in metrics


@pytest.mark.parametrize("name, fault", [("lost", signal.SIGKILL), ("frozen", signal.SIGSTOP)])
def test_without_redis_each_router_keeps_its_part_and_nothing_hangs(
    fronts: Fronts, name: str, fault: signal.Signals
) -> None:
    redis = fronts.redis
    redis.process.send_signal(fault)
    began = time.monotonic()
    responses = burst(fronts, name, 60)
    took = time.monotonic() - began
    # Half of 20 for each.
    assert statuses(responses) == {200: 20, 429: 40}
    assert took < 10
    assert max(r.elapsed.total_seconds() for r in responses) < 3
    if fault == signal.SIGKILL:
        redis.kill()
        redis.start()
    else:
        redis.process.send_signal(signal.SIGCONT)

    def up() -> bool:
        return all("wherry_router_redis_up 1.0" in httpx.get(r.url + "/metrics").text for r in fronts.routers)

    eventually(up)
    redis.client.flushall()
    assert statuses(burst(fronts, "back", 12)) == {200: 4, 429: 8}
