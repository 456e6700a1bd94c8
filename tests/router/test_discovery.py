"""Pods to endpoints, and a watch against an API server that misbehaves (a real HTTP server)."""

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from aiohttp import web

from wherry_router.discovery.endpoints import parse_endpoints
from wherry_router.discovery.pods import PodSet, Target, read, targets
from wherry_router.discovery.watch import PodWatch, api_client
from wherry_router.pool import Pool

LATER = "2026-01-01T00:05:00Z"
LATER_UNIX = 1767225900.0


def pod(
    name: str,
    ip: str | None = "10.0.0.1",
    ready: str | None = "True",
    version: str = "1",
    *,
    group: str = "",
    rank: str = "0",
    size: int = 1,
    drain: str | None = None,
    phase: str = "Running",
    port: str = "http",
    **metadata: Any,
) -> dict[str, Any]:
    """A pod as the API server has it. `Ready` is false throughout: it waits for the operator's gate."""
    conditions = (
        [] if ready is None else [{"type": "ContainersReady", "status": ready}, {"type": "Ready", "status": "False"}]
    )
    labels = {"inference.wherry.dev/group": group or name, "inference.wherry.dev/rank": rank}
    annotations = {} if drain is None else {"inference.wherry.dev/drain": drain}
    container: dict[str, Any] = {"name": "runtime", "ports": [{"name": port, "containerPort": 8000}]}
    if size > 1:
        container["env"] = [{"name": "LWS_GROUP_SIZE", "value": str(size)}]
    return {
        "metadata": {
            "name": name,
            "uid": f"uid-{name}",
            "resourceVersion": version,
            "labels": labels,
            "annotations": annotations,
            **metadata,
        },
        "spec": {"containers": [container]},
        "status": {"podIP": ip, "conditions": conditions, "phase": phase},
    }


def pair(**second: Any) -> list[dict[str, Any]]:
    """A group of two pods; `second` is said of the one that is not the leader."""
    return [
        pod("g-0", group="g", size=2),
        pod("g-1", **{"ip": "10.0.0.2", "group": "g", "rank": "1", "size": 2} | second),
    ]


SECURE = {"port": "https"}
GONE = {"deletionTimestamp": "2026-01-01T00:00:00Z"}

CASES: list[tuple[str, list[dict[str, Any]], list[str]]] = [
    # What is there → URLs, with "drains" or "drains at TIME" behind those that take nothing new.
    ("nothing", [], []),
    ("one ready pod", [pod("a")], ["http://10.0.0.1:8000"]),
    ("an IPv6 address", [pod("a", ip="fd00::1")], ["http://[fd00::1]:8000"]),
    ("no address", [pod("a", ip=None)], []),
    ("containers not ready", [pod("a", ready="False")], []),
    ("nobody knows whether they are", [pod("a", ready="Unknown")], []),
    ("no conditions yet", [pod("a", ready=None)], []),
    ("it is over", [pod("a", phase="Failed")], []),
    ("being deleted", [pod("a", **GONE)], ["http://10.0.0.1:8000 drains"]),
    ("being deleted and not ready any more", [pod("a", ready="False", **GONE)], ["http://10.0.0.1:8000 drains"]),
    ("being deleted and over", [pod("a", phase="Succeeded", **GONE)], []),
    ("marked", [pod("a", drain=LATER)], [f"http://10.0.0.1:8000 drains at {LATER_UNIX}"]),
    ("marked in another zone", [pod("a", drain="2026-01-01T02:05:00+02:00")],
     [f"http://10.0.0.1:8000 drains at {LATER_UNIX}"]),
    ("marked with what is no time", [pod("a", drain="soon")], ["http://10.0.0.1:8000 drains"]),
    ("marked, then deleted", [pod("a", drain=LATER, **GONE)], [f"http://10.0.0.1:8000 drains at {LATER_UNIX}"]),
    ("two groups of one", [pod("a"), pod("b", ip="10.0.0.2")], ["http://10.0.0.1:8000", "http://10.0.0.2:8000"]),
    ("a group of two: only the leader", pair(), ["http://10.0.0.1:8000"]),
    ("its second pod is not ready", pair(ready="False"), []),
    ("its second pod is not there", pair()[:1], []),
    ("its leader is not there", pair()[1:], []),
    ("its second pod is of another group", pair(group="h"), []),
    ("its second pod says the same rank", pair(rank="0"), []),
    ("its second pod is deleted", pair(**GONE), ["http://10.0.0.1:8000 drains"]),
    ("its second pod is marked", pair(drain=LATER), [f"http://10.0.0.1:8000 drains at {LATER_UNIX}"]),
    ("a pod without labels", [{"metadata": {"name": "a"}}], []),
    ("nothing of a pod", [{}], []),
]  # fmt: skip


@pytest.mark.parametrize("_, pods, expected", CASES, ids=[case[0] for case in CASES])
def test_where_requests_may_run(_: str, pods: list[dict[str, Any]], expected: list[str]) -> None:
    def told(target: Target) -> str:
        at = "" if target.deadline is None else f" at {target.deadline}"
        return target.endpoint.url + (f" drains{at}" if target.draining else "")

    assert [told(target) for target in targets(map(read, pods))] == expected


SPEAK: list[tuple[str, list[dict[str, Any]], list[str], list[str]]] = [
    # What is there → what a router with plain HTTP talks to, and what one with mutual TLS does.
    ("only plain ones", [pod("a")], ["http://10.0.0.1:8000"], []),
    ("only secure ones", [pod("a", **SECURE)], [], ["https://10.0.0.1:8000"]),
    (
        "a rollout from one to the other",
        [pod("a"), pod("b", ip="10.0.0.2", **SECURE)],
        ["http://10.0.0.1:8000"],
        ["https://10.0.0.2:8000"],
    ),
    (
        "a secure group of two",
        [*pair(**SECURE)[1:], pod("g-0", group="g", size=2, **SECURE)],
        [],
        ["https://10.0.0.1:8000"],
    ),
    ("a secure one that drains", [pod("a", **SECURE, **GONE)], [], ["https://10.0.0.1:8000"]),
]


@pytest.mark.parametrize("_, pods, plain, secure", SPEAK, ids=[case[0] for case in SPEAK])
def test_a_router_talks_in_one_way_only(
    _: str, pods: list[dict[str, Any]], plain: list[str], secure: list[str]
) -> None:
    for mutual, expected in ((False, plain), (True, secure)):
        found = PodSet(secure=mutual)
        found.reset({"metadata": {"resourceVersion": "5"}, "items": pods})
        assert [target.endpoint.url for target in found.targets] == expected
        named = {target.endpoint.name.partition("/")[0] for target in found.targets}
        assert not named & set(found.foreign)


def test_a_pod_that_comes_back_under_its_name_is_another_endpoint() -> None:
    assert read(pod("a", uid="1")).endpoint != read(pod("a", uid="2")).endpoint


def test_events_add_up() -> None:
    pods = PodSet()
    pods.reset({"metadata": {"resourceVersion": "5"}, "items": [pod("a"), pod("b", ip="10.0.0.2", ready="False")]})
    assert [t.endpoint.url for t in pods.targets] == ["http://10.0.0.1:8000"]
    assert pods.apply("MODIFIED", pod("b", ip="10.0.0.2", version="6"))
    assert not pods.apply("MODIFIED", pod("b", ip="10.0.0.2", version="7"))
    assert not pods.apply("BOOKMARK", {"metadata": {"resourceVersion": "9"}})
    assert pods.resource_version == "9"
    assert pods.apply("DELETED", pod("a", version="10"))
    assert not pods.apply("DELETED", pod("gone", version="11"))
    assert [t.endpoint.url for t in pods.targets] == ["http://10.0.0.2:8000"]


@pytest.mark.parametrize("text", ["", ",", "10.0.0.1:8000", "https://a", "http://a", "http://a:1/path", "ftp://a:1"])
def test_bad_endpoints_are_told(text: str) -> None:
    with pytest.raises(ValueError):
        parse_endpoints(text)


def test_endpoints() -> None:
    assert [e.url for e in parse_endpoints("https://a:1")] == ["https://a:1"]
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


async def test_a_router_that_is_ahead_of_a_rollout_waits_until_it_can_serve(
    watched: tuple[FakeApi, Pool, web.TCPSite], caplog: pytest.LogCaptureFixture
) -> None:
    """Until then it is not ready, so that those from before go on with the pods from before."""
    api, pool, _ = watched
    api.items = [pod("a", **SECURE)]
    await until(lambda: len(api.watches) == 1)
    pool.known = False
    await api.events.put({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}})
    await api.events.put(None)  # the watch from before ends
    await until(lambda: any(record.message == "pods left out" for record in caplog.records))
    await until(lambda: len(api.watches) == 2)
    assert not pool.known
    await api.events.put({"type": "ADDED", "object": pod("b", version="301")})
    await until(lambda: urls(pool) == ["http://10.0.0.1:8000"])
    assert pool.known


async def test_a_router_is_ready_when_what_it_cannot_talk_to_is_gone(
    watched: tuple[FakeApi, Pool, web.TCPSite],
) -> None:
    """Scaled to nothing, for one: it knows that there are none."""
    api, pool, _ = watched
    api.items = [pod("a", **SECURE)]
    await until(lambda: len(api.watches) == 1)
    pool.known = False
    await api.events.put({"type": "ERROR", "object": {"kind": "Status", "code": 410, "reason": "Expired"}})
    await api.events.put(None)  # the watch from before ends
    await until(lambda: len(api.watches) == 2)
    assert not pool.known
    await api.events.put({"type": "DELETED", "object": pod("a", version="301", **SECURE)})
    await until(lambda: pool.known)
    assert urls(pool) == []


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


def states(pool: Pool) -> list[tuple[str, int]]:
    return [(replica.state, replica.in_flight) for replica in pool.report()]


async def test_a_drain_can_be_withdrawn(watched: tuple[FakeApi, Pool, web.TCPSite]) -> None:
    """What a cancelled scale-down marked must serve again, with nothing left of the mark."""
    api, pool, _ = watched
    await api.events.put({"type": "ADDED", "object": pod("a", version="101")})
    await until(lambda: states(pool) == [("routable", 0)])
    replica = pool.choose([])
    assert replica is not None
    lease = pool.lease(replica, 1, 1)
    when = datetime.now(UTC) + timedelta(seconds=60)
    await api.events.put({"type": "MODIFIED", "object": pod("a", version="102", drain=when.isoformat())})
    await until(lambda: states(pool) == [("draining", 1)])
    assert pool.choose([]) is None
    assert replica.drain_deadline is not None
    assert 50 < replica.drain_deadline - asyncio.get_running_loop().time() <= 60
    await api.events.put({"type": "MODIFIED", "object": pod("a", version="103")})
    await until(lambda: states(pool) == [("routable", 1)])
    assert (replica.draining, replica.drain_deadline) == (False, None)
    assert pool.choose([]) is replica, "the same replica, with what it owes"
    lease.release()
    assert states(pool) == [("routable", 0)]


async def test_what_still_runs_on_a_pod_that_is_gone_is_reported_until_it_ends(
    watched: tuple[FakeApi, Pool, web.TCPSite],
) -> None:
    api, pool, _ = watched
    await api.events.put({"type": "ADDED", "object": pod("a", version="101")})
    await until(lambda: states(pool) == [("routable", 0)])
    replica = pool.choose([])
    assert replica is not None
    leases = [pool.lease(replica, 1, 1) for _ in range(2)]
    await api.events.put({"type": "MODIFIED", "object": pod("a", version="102", ready="False")})
    await until(lambda: states(pool) == [("draining", 2)])
    leases[0].release()
    assert states(pool) == [("draining", 1)]
    await api.events.put({"type": "MODIFIED", "object": pod("a", version="103")})
    await until(lambda: states(pool) == [("routable", 1)])
    await api.events.put({"type": "DELETED", "object": pod("a", version="104")})
    await until(lambda: states(pool) == [("draining", 1)])
    leases[1].release()
    assert states(pool) == []


async def test_a_group_is_used_once_its_last_pod_is_ready(watched: tuple[FakeApi, Pool, web.TCPSite]) -> None:
    api, pool, _ = watched
    leader, other = pair(ready="False")
    for value in (leader, other):
        await api.events.put({"type": "ADDED", "object": value})
    await api.events.put({"type": "ADDED", "object": pod("b", ip="10.0.0.9", version="103")})
    await until(lambda: urls(pool) == ["http://10.0.0.9:8000"])
    await api.events.put({"type": "MODIFIED", "object": pair()[1]})
    await until(lambda: urls(pool) == ["http://10.0.0.1:8000", "http://10.0.0.9:8000"])
    await api.events.put({"type": "DELETED", "object": pair()[1]})
    await until(lambda: urls(pool) == ["http://10.0.0.9:8000"])
