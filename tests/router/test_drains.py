"""Pods that drain, under streams: a real router that watches an API server, with mock workers as its pods."""

import asyncio
import json
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from aiohttp import web
from tests.router.harness import MODEL, Mock, Process, chat, eventually, mock_worker, post, running, script, text_of
from tests.router.test_discovery import FakeApi, pod
from tests.router.test_failover import Background

TOKEN = "the-token"
TOKENS = 60
SLOW = {"tokens": TOKENS, "pause_s": 0.05, "named": False}


class Cluster:
    """An API server with pods that are mock workers, and a router that watches it."""

    def __init__(self, stack: ExitStack, tmp_path: Path) -> None:
        self.mocks: dict[str, Mock] = {
            name: stack.enter_context(mock_worker(name, "--token", TOKEN)) for name in ("a-0", "b-0")
        }
        self._loop = asyncio.new_event_loop()
        self._api = FakeApi()
        self._version = 1000
        self._api.items = [self.pod(name) for name in self.mocks]
        thread = threading.Thread(target=self._loop.run_forever)
        thread.start()
        stack.callback(self._loop.close)
        stack.callback(thread.join, 10)
        stack.callback(self._loop.call_soon_threadsafe, self._loop.stop)
        runner = self._do(self._serve())
        stack.callback(lambda: self._do(self._end(runner)))
        kubeconfig = tmp_path / "kubeconfig"
        server = f"http://127.0.0.1:{runner.addresses[0][1]}"
        kubeconfig.write_text(json.dumps(_kubeconfig(server)))
        args = ["--deployment", "demo", "--namespace", "ns", "--kubeconfig", str(kubeconfig), "--model", MODEL]
        process = Process(
            "wherry_router", [*args, "--port", "0", "--drain-grace-s", "0"], {"WHERRY_WORKER_TOKEN": TOKEN}
        )
        self.router = stack.enter_context(running(process))

    def _do(self, work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(20)

    async def _serve(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/api/v1/namespaces/ns/pods", self._api.pods)
        runner = web.AppRunner(app, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        return runner

    async def _end(self, runner: web.AppRunner) -> None:
        await self._api.events.put(None)
        await runner.cleanup()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        await asyncio.wait(rest, timeout=5) if rest else None

    def pod(self, name: str, **more: Any) -> dict[str, Any]:
        self._version += 1
        value = pod(name, ip="127.0.0.1", version=str(self._version), **more)
        ports = value["spec"]["containers"][0]["ports"]
        ports[0]["containerPort"] = urlsplit(self.mocks[name].url).port
        return value

    def event(self, kind: str, name: str, **more: Any) -> None:
        self._do(self._api.events.put({"type": kind, "object": self.pod(name, **more)}))

    def reset(self) -> None:
        """Both pods serve, and nothing has happened yet."""
        for name, mock in self.mocks.items():
            self.event("ADDED", name)
            mock.set(executed=0, tokens_sent=0, resumed_at=[])
        eventually(lambda: self.report() == dict.fromkeys(self.mocks, ("routable", 0)))

    def report(self) -> dict[str, tuple[str, int]]:
        answer = httpx.get(self.router.url + "/internal/replicas", headers={"Authorization": f"Bearer {TOKEN}"})
        return {r["name"].split("/")[0]: (r["state"], r["in_flight"]) for r in answer.json()["replicas"]}

    def stream(self) -> tuple[Background, str, str]:
        """A running stream, the pod that it runs on, and the other one."""
        content = script(**SLOW)
        request = Background(self.router.url, content)
        request.start()
        busy = eventually(lambda: next((name for name, (_, count) in self.report().items() if count), ""))
        eventually(lambda: self.mocks[busy].state()["tokens_sent"] > 1)
        return request, busy, next(name for name in self.mocks if name != busy)

    def executed(self, name: str) -> int:
        return int(self.mocks[name].state()["executed"])


def _kubeconfig(server: str) -> dict[str, Any]:
    return {
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "contexts": [{"name": "x", "context": {"cluster": "c", "user": "u"}}],
        "current-context": "x",
        "users": [{"name": "u", "user": {}}],
    }


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with ExitStack() as stack:
        yield Cluster(stack, tmp_path_factory.mktemp("cluster"))


@pytest.fixture
def cluster(one: Cluster) -> Cluster:
    one.reset()
    return one


def in_seconds(seconds: float) -> str:
    return (datetime.now(UTC) + timedelta(seconds=seconds)).isoformat()


def whole(request: Background) -> bool:
    """Whether every token came once and in order, and the stream said that it is done."""
    request.join(30)
    numbers = [int(number) for number in re.findall(r"}\|(\d+) ", text_of(request.chunks[:-1]))]
    return request.error is None and request.chunks[-1] == {} and numbers == list(range(TOKENS))


def send(cluster: Cluster, count: int) -> None:
    for _ in range(count):
        assert post(cluster.router.url, chat("hello")).status_code == 200


def test_at_the_deadline_streams_go_on_elsewhere_and_nobody_is_blamed(cluster: Cluster) -> None:
    request, busy, other = cluster.stream()
    cluster.event("MODIFIED", busy, drain=in_seconds(1))
    eventually(lambda: cluster.report()[busy] == ("draining", 1))
    before = cluster.executed(busy)
    send(cluster, 4)
    assert cluster.executed(busy) == before, "nothing new"
    eventually(lambda: cluster.report()[other][1] == 1)
    eventually(lambda: cluster.report()[busy] == ("draining", 0))
    assert whole(request)
    assert cluster.mocks[other].state()["resumed_at"], "it went on, and did not begin anew"
    assert not cluster.router.messages("breaker")


def test_a_stream_that_ends_before_the_deadline_stays_where_it_is(cluster: Cluster) -> None:
    request, busy, other = cluster.stream()
    cluster.event("MODIFIED", busy, drain=in_seconds(60))
    eventually(lambda: cluster.report()[busy] == ("draining", 1))
    assert whole(request)
    eventually(lambda: cluster.report()[busy] == ("draining", 0))
    assert not cluster.mocks[other].state()["executed"]


def test_a_withdrawn_drain_moves_nothing_and_the_pod_serves_again(cluster: Cluster) -> None:
    request, busy, other = cluster.stream()
    cluster.event("MODIFIED", busy, drain=in_seconds(1))
    eventually(lambda: cluster.report()[busy] == ("draining", 1))
    cluster.event("MODIFIED", busy)
    eventually(lambda: cluster.report()[busy] == ("routable", 1))
    assert whole(request)
    assert not cluster.mocks[other].state()["resumed_at"]
    before = cluster.executed(busy)
    send(cluster, 4)
    assert cluster.executed(busy) > before


def test_a_pod_that_is_being_deleted_finishes_its_streams(cluster: Cluster) -> None:
    request, busy, _ = cluster.stream()
    cluster.event("MODIFIED", busy, deletionTimestamp="2026-01-01T00:00:00Z")
    eventually(lambda: cluster.report()[busy] == ("draining", 1))
    before = cluster.executed(busy)
    send(cluster, 4)
    assert cluster.executed(busy) == before
    cluster.event("DELETED", busy)
    send(cluster, 1)
    assert cluster.report()[busy] == ("draining", 1), "gone from the list, and still counted"
    assert whole(request)
    eventually(lambda: busy not in cluster.report())
