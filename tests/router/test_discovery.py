"""Pods to endpoints, and a watch against an API server that misbehaves (a real HTTP server)."""

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web

from wherry_router.discovery.endpoints import parse_endpoints
from wherry_router.discovery.pods import PodSet, routable
from wherry_router.discovery.watch import PodWatch, api_client
from wherry_router.pool import Pool


def pod(
    name: str, ip: str | None = "10.0.0.1", ready: str | None = "True", version: str = "1", **metadata: Any
) -> dict[str, Any]:
    conditions = (
        [] if ready is None else [{"type": "ContainersReady", "status": "True"}, {"type": "Ready", "status": ready}]
    )
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "resourceVersion": version, **metadata},
        "spec": {"containers": [{"name": "runtime", "ports": [{"name": "http", "containerPort": 8000}]}]},
        "status": {"podIP": ip, "conditions": conditions},
    }


@pytest.mark.parametrize(
    "value, url",
    [
        (pod("a"), "http://10.0.0.1:8000"),
        (pod("a", ip="fd00::1"), "http://[fd00::1]:8000"),
        (pod("a", ip=None), None),
        (pod("a", ready="False"), None),
        (pod("a", ready="Unknown"), None),
        (pod("a", ready=None), None),
        (pod("a", deletionTimestamp="2026-01-01T00:00:00Z"), None),
        ({"metadata": {"name": "a"}}, None),
        ({}, None),
    ],
)
def test_which_pods_are_routable(value: dict[str, Any], url: str | None) -> None:
    endpoint = routable(value)
    assert (endpoint.url if endpoint else None) == url


def test_a_pod_that_comes_back_under_its_name_is_another_endpoint() -> None:
    assert routable(pod("a", uid="1")) != routable(pod("a", uid="2"))


def test_events_add_up() -> None:
    pods = PodSet()
    pods.reset({"metadata": {"resourceVersion": "5"}, "items": [pod("a"), pod("b", ip="10.0.0.2", ready="False")]})
    assert [e.url for e in pods.endpoints()] == ["http://10.0.0.1:8000"]
    assert pods.apply("MODIFIED", pod("b", ip="10.0.0.2", version="6"))
    assert not pods.apply("MODIFIED", pod("b", ip="10.0.0.2", version="7"))
    assert not pods.apply("BOOKMARK", {"metadata": {"resourceVersion": "9"}})
    assert pods.resource_version == "9"
    assert pods.apply("DELETED", pod("a", version="10"))
    assert not pods.apply("DELETED", pod("gone", version="11"))
    assert [e.url for e in pods.endpoints()] == ["http://10.0.0.2:8000"]


@pytest.mark.parametrize("text", ["", ",", "10.0.0.1:8000", "https://a:1", "http://a", "http://a:1/path", "ftp://a:1"])
def test_bad_endpoints_are_told(text: str) -> None:
    with pytest.raises(ValueError):
        parse_endpoints(text)


def test_endpoints() -> None:
    assert [e.url for e in parse_endpoints("http://a:1, http://b:2/,http://a:1")] == ["http://a:1", "http://b:2"]


class FakeApi:
    """An API server that lists what it is told and streams events from a queue; None ends a watch."""

    def __init__(self) -> None:
        self.items: list[dict[str, Any]] = []
        self.events: asyncio.Queue[dict[str, Any] | None] = asyncio.Queue()
        self.lists = 0
        self.watches: list[str] = []
        self.fail = 0

    async def pods(self, request: web.Request) -> web.StreamResponse:
        if self.fail:
            self.fail -= 1
            return web.json_response({"kind": "Status", "code": 500}, status=500)
        assert "inference.wherry.dev/deployment=demo" in request.query["labelSelector"]
        if "watch" not in request.query:
            self.lists += 1
            return web.json_response({"metadata": {"resourceVersion": str(100 * self.lists)}, "items": self.items})
        self.watches.append(request.query["resourceVersion"])
        response = web.StreamResponse()
        await response.prepare(request)
        while (event := await self.events.get()) is not None:
            await response.write(json.dumps(event).encode() + b"\n")
        return response


async def until(probe: Any) -> None:
    async with asyncio.timeout(20):
        while not probe():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.fixture
async def watched(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[FakeApi, Pool, web.TCPSite]]:
    api = FakeApi()
    app = web.Application()
    app.router.add_get("/api/v1/namespaces/ns/pods", api.pods)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    kubeconfig = tmp_path / "kubeconfig"
    cluster = {"name": "c", "cluster": {"server": runner.addresses and f"http://127.0.0.1:{runner.addresses[0][1]}"}}
    context = {"name": "x", "context": {"cluster": "c", "user": "u"}}
    config = {
        "clusters": [cluster],
        "contexts": [context],
        "current-context": "x",
        "users": [{"name": "u", "user": {}}],
    }
    kubeconfig.write_text(json.dumps(config))
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig))
    pool = Pool()
    async with await api_client(None) as client:
        watching = asyncio.create_task(PodWatch(client, "ns", "demo", pool).run())
        yield api, pool, site
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
    await api.events.put(None)
    await runner.cleanup()


def urls(pool: Pool) -> list[str]:
    return sorted(replica.endpoint.url for replica in pool.replicas())


async def test_watch_follows_and_resumes(watched: tuple[FakeApi, Pool, web.TCPSite]) -> None:
    api, pool, _ = watched
    await until(lambda: pool.known)
    assert urls(pool) == []
    await api.events.put({"type": "ADDED", "object": pod("a", ready="False", version="101")})
    await api.events.put({"type": "MODIFIED", "object": pod("a", version="102")})
    await until(lambda: urls(pool) == ["http://10.0.0.1:8000"])
    await api.events.put(None)  # the server ends the watch, as it does every few minutes
    await until(lambda: len(api.watches) == 2)
    assert api.watches == ["100", "102"], "the next watch goes on from the last event, with no new list"
    assert api.lists == 1
    await api.events.put({"type": "DELETED", "object": pod("a", version="103")})
    await until(lambda: urls(pool) == [])


async def test_410_lists_anew(watched: tuple[FakeApi, Pool, web.TCPSite]) -> None:
    api, pool, _ = watched
    await until(lambda: len(api.watches) == 1)
    api.items = [pod("b", ip="10.0.0.2")]
    await api.events.put({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}})
    await until(lambda: urls(pool) == ["http://10.0.0.2:8000"])
    await api.events.put(None)
    await until(lambda: "200" in api.watches)


async def test_the_last_known_set_stays_while_the_api_server_is_gone(
    watched: tuple[FakeApi, Pool, web.TCPSite],
) -> None:
    api, pool, _ = watched
    await api.events.put({"type": "ADDED", "object": pod("a", version="101")})
    await until(lambda: urls(pool) == ["http://10.0.0.1:8000"])
    api.fail = 3
    api.items = [pod("c", ip="10.0.0.3")]
    await api.events.put(None)
    await until(lambda: api.fail < 2)
    assert urls(pool) == ["http://10.0.0.1:8000"]
    await until(lambda: urls(pool) == ["http://10.0.0.3:8000"])
