"""Replicas follow the load that workers really report."""

import asyncio
import base64
import threading
from collections.abc import Iterator

import msgspec
import pytest
from aiohttp import web
from tests.operator.harness import Kube, Kubelet, OperatorProcess, eventually
from tests.operator.pods import pod

from wherry_operator.autoscaling.decide import Signal
from wherry_operator.cluster import load
from wherry_protocol import naming
from wherry_protocol.worker import LoadReport


class Workers:
    """Answers GET /load at every loopback address of the played pods, for those who know the token."""

    def __init__(self) -> None:
        self.token = ""
        self.running = 0
        self.fail = False
        self._runners: list[web.AppRunner] = []
        self._up = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),))
        self._thread.start()
        self._up.wait(10)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._up.set()
        await self._stop.wait()
        for runner in self._runners:
            await runner.cleanup()

    def serve(self, address: str) -> None:
        asyncio.run_coroutine_threadsafe(self._serve(address), self._loop).result(10)

    async def _serve(self, address: str) -> None:
        app = web.Application()
        app.router.add_get("/load", self._load)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, address, naming.WORKER_PORT).start()
        self._runners.append(runner)

    async def _load(self, request: web.Request) -> web.Response:
        if self.fail:
            return web.Response(status=503)
        if request.headers.get("Authorization") != f"Bearer {self.token}":
            return web.Response(status=401)
        report = LoadReport(
            model="tiny", ready=True, running=self.running, waiting=0, max_running=64, kv_tokens_used=10,
            kv_tokens_total=100, prompt_tokens_total=0, completion_tokens_total=0, prefix_hit_tokens_total=0,
            preemptions_total=0, steps_total=0, heartbeat_age_s=0.0,
        )  # fmt: skip
        return web.Response(body=msgspec.json.encode(report))

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)


@pytest.fixture
def workers() -> Iterator[Workers]:
    workers = Workers()
    yield workers
    workers.close()


def test_replicas_follow_the_load(workers: Workers, kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    for number in range(1, 12):
        workers.serve(f"127.9.0.{number}")
    behavior = {"scaleDown": {"stabilizationWindow": "1s"}}
    targets = {"requestsPerReplica": 10}
    kube.deployment(scaling={"minReplicas": 1, "maxReplicas": 3, "targets": targets, "behavior": behavior})
    kube.wait_ready()
    eventually(lambda: kube.condition("ScalingActive").get("reason") == "NoSignals", "a wrong token is no signal")
    workers.token = base64.b64decode(kube.get("secrets", "chat-worker-token")["data"]["token"]).decode()
    eventually(lambda: kube.condition("ScalingActive").get("status") == "True", "signals arrive")
    workers.running = 25
    eventually(lambda: len(kube.runtime_pods()) == 3, "it scales up")
    eventually(lambda: kube.wait_ready()["status"]["desiredReplicas"] == 3, "the status says so")
    workers.fail, workers.running = True, 0
    eventually(lambda: kube.condition("ScalingActive")["reason"] == "NoSignals", "the signals are gone")
    assert len(kube.runtime_pods()) == 3, "missing signals scaled down"
    workers.fail = False
    eventually(lambda: len(kube.runtime_pods()) == 1, "it scales down")


async def test_workers_that_do_not_answer_are_no_signal(workers: Workers) -> None:
    workers.token, workers.running = "t", 4
    workers.serve("127.9.7.1")
    good, gone, odd = pod("a", ip="127.9.7.1"), pod("b", ip="127.9.7.2"), pod("c", ip="not-an-address/")
    assert await load.poll([good, gone, odd], "t") == [Signal(4, 0.1), None, None]
    assert await load.poll([good], "wrong") == [None]
