"""Bounds per replica, the retry budget and panic mode, as clients see them: real processes."""

from contextlib import ExitStack

import httpx
import pytest
from prometheus_client import CollectorRegistry
from tests.router.harness import Mock, Process, chat, eventually, mock_worker, post, router, script
from tests.router.test_failover import Background

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import ExecuteRequest, Prompt
from wherry_router.backend import Delivery
from wherry_router.metrics import RouterMetrics
from wherry_router.pool import Endpoint
from wherry_router.replicas import Replicas
from wherry_router.settings import Limits
from wherry_router.upstream import Upstream


def metric(front: Process, name: str) -> float:
    lines = httpx.get(front.url + "/metrics").text.splitlines()
    return float(next(line.split()[-1] for line in lines if line.startswith(name + " ")))


def test_a_full_replica_is_passed_over_and_with_none_left_requests_wait() -> None:
    with ExitStack() as stack:
        mocks: list[Mock] = [stack.enter_context(mock_worker(name)) for name in "ab"]
        front = stack.enter_context(
            router(*(mock.url for mock in mocks), args=("--max-per-replica", "2", "--no-resume"))
        )
        # Held for ever, on both: two each.
        held = [Background(front.url, script(tokens=9, hold_after=2)) for _ in range(4)]
        for request in held:
            request.start()
        eventually(lambda: [mock.state()["running"] for mock in mocks] == [2, 2])
        refused = post(front.url, chat("hello"), headers={"x-wherry-queue-timeout-ms": "100"})
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "queue_timeout")
        for mock in mocks:
            mock.process.kill()
        for request in held:
            request.join(20)
            assert not request.is_alive()


async def test_where_the_load_is_not_known_it_is_429() -> None:
    limits, registry = Limits(max_per_replica=1), CollectorRegistry()
    upstream = Upstream(None, limits)
    backend = Replicas(upstream, limits, RouterMetrics(registry))
    backend.pool.set_endpoints([Endpoint("a", "http://127.0.0.1:9")])
    [full] = backend.pool.replicas()
    backend.pool.lease(full, 1, 1)
    request = ExecuteRequest(id="r", model="chat", prompt=Prompt(text="hello"))
    with pytest.raises(ApiError) as refused:
        await anext(backend.generate(request, "c", Delivery(whole=True)))
    await upstream.close()
    await backend.close()
    assert (refused.value.status, refused.value.code, refused.value.retry_after_s) == (429, "replicas_busy", 1)
    assert registry.get_sample_value("wherry_router_bulkhead_refusals_total") == 1


def test_retries_over_the_budget_are_denied_and_told() -> None:
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name)) for name in "ab"]
        args = ("--retry-share", "0", "--retry-min-per-s", "0.2", "--breaker-faults", "1000")
        front = stack.enter_context(router(*(mock.url for mock in mocks), args=args))
        for _ in range(6):
            assert post(front.url, chat(script(status=500))).status_code == 503
        assert sum(mock.state()["executed"] for mock in mocks) == 6 + 2, "two retries in ten seconds"
        assert metric(front, "wherry_router_retries_denied_total") == 4


def test_when_all_look_bad_all_are_used() -> None:
    with ExitStack() as stack:
        mocks = [stack.enter_context(mock_worker(name)) for name in "ab"]
        front = stack.enter_context(router(*(mock.url for mock in mocks), args=("--breaker-faults", "1")))
        assert post(front.url, chat(script(status=500))).status_code == 503
        assert metric(front, "wherry_router_panics_total") == 1
        # Nobody had to wait for a probe, and whoever answers is well again.
        for _ in range(4):
            assert post(front.url, chat("hello")).status_code == 200
        assert metric(front, "wherry_router_panic") == 0
        assert 'wherry_router_replicas{state="suspect"} 0.0' in httpx.get(front.url + "/metrics").text


async def test_a_request_waits_for_a_replica_once_however_often_it_is_tried() -> None:
    """None is there; then two come, and both fail: nothing more is waited for."""
    limits = Limits(no_replica_wait_s=7.0, max_tries=4)
    upstream = Upstream(None, limits)
    backend = Replicas(upstream, limits, RouterMetrics(CollectorRegistry()))
    waited: list[float] = []
    gone = [Endpoint(name, "http://127.0.0.1:9") for name in "ab"]

    async def wait(timeout_s: float) -> None:
        waited.append(timeout_s)
        backend.pool.set_endpoints(gone)

    backend.pool.wait = wait  # type: ignore[method-assign]
    request = ExecuteRequest(id="r", model="m", prompt=Prompt(text="hi"))
    with pytest.raises(ApiError) as refused:
        async for _ in backend.generate(request, "c", Delivery(whole=True)):
            pass
    assert (refused.value.status, refused.value.code) == (503, "no_replica")
    assert waited == [7.0]
    await backend.close()
    await upstream.close()
