"""Planned moves against a real API server and a real disruption controller; a played router answers the operator."""

import asyncio
import base64
import json
import subprocess
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
from aiohttp import web
from tests.operator.control_plane import ControlPlane, require_binary
from tests.operator.harness import MERGE, Kube, Kubelet, OperatorProcess, condition_states, eventually, running

from wherry_protocol import naming
from wherry_protocol.router_report import PATH, ReplicaReport, RouterReport

ADDRESS = "127.9.77.1"
MARK = naming.ANNOTATION_DRAIN


class Router:
    """One router: a pod that seems to run, and an answer to GET /internal/replicas that fits the pods there are.

    `load`: requests in flight by pod. `blind`: it learns of no further pods.
    """

    def __init__(self, kube: Kube) -> None:
        self._kube = Kube(kube.plane, kube.namespace)
        self.load: dict[str, int] = {}
        self.blind = False
        self.known: set[str] = set()
        self._up = threading.Event()
        self._thread = threading.Thread(target=asyncio.run, args=(self._run(),))
        self._thread.start()
        assert self._up.wait(10)

    async def _run(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        app = web.Application()
        app.router.add_get(PATH, self._answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        await web.TCPSite(runner, ADDRESS, naming.ROUTER_PORT).start()
        self._up.set()
        await self._stop.wait()
        await runner.cleanup()

    async def _answer(self, request: web.Request) -> web.Response:
        report = await asyncio.to_thread(self._report)
        secret = await asyncio.to_thread(self._kube.get, "secrets", "chat-worker-token")
        token = base64.b64decode(secret["data"]["token"]).decode()
        if request.headers.get("Authorization") != f"Bearer {token}":
            return web.Response(status=401)
        return web.Response(body=msgspec.json.encode(report))

    def _report(self) -> RouterReport:
        replicas = []
        for pod in self._kube.runtime_pods():
            name, uid = pod["metadata"]["name"], pod["metadata"]["uid"]
            ready = condition_states(pod).get("ContainersReady") == "True"
            if name in self.known or (ready and not self.blind):
                self.known.add(name)
                marked = MARK in pod["metadata"].get("annotations", {})
                state: Any = "draining" if marked else "routable"
                replicas.append(ReplicaReport(name=f"{name}/{uid}", state=state, in_flight=self.load.get(name, 0)))
        return RouterReport(replicas=replicas, draining=False)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)
        self._kube.http.close()


def router_pod() -> dict[str, Any]:
    labels = {naming.LABEL_DEPLOYMENT: "chat", naming.LABEL_COMPONENT: "router"}
    labels[naming.LABEL_MANAGED_BY] = "wherry-operator"
    security = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    container = {"name": "router", "image": "x", "securityContext": security}
    pod = {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    return {
        "metadata": {"name": "chat-router-0", "labels": labels},
        "spec": {"containers": [container], "securityContext": pod},
    }


@pytest.fixture
def router(kube: Kube, kubelet: Kubelet) -> Iterator[Router]:
    router = Router(kube)
    usual = kubelet.behaviour
    is_router = lambda pod: pod["metadata"]["name"] == "chat-router-0"  # noqa: E731
    kubelet.behaviour = lambda pod: running(ADDRESS) if is_router(pod) else usual(pod)
    kube.create("pods", router_pod())
    eventually(lambda: kube.get("pods", "chat-router-0")["status"].get("podIP"), "the router runs")
    yield router
    router.close()


def names(kube: Kube) -> set[str]:
    return {pod["metadata"]["name"] for pod in kube.runtime_pods()}


def marked(kube: Kube) -> set[str]:
    return {p["metadata"]["name"] for p in kube.runtime_pods() if MARK in p["metadata"].get("annotations", {})}


def waits(kube: Kube) -> str:
    return "; ".join(entry["reason"] for entry in kube.get("llmdeployments", "chat")["status"].get("plan", []))


def scale(kube: Kube, replicas: int) -> None:
    kube.patch("llmdeployments", "chat", {"spec": {"replicas": replicas}})


def reasons(kube: Kube) -> set[str]:
    return {event["reason"] for event in kube.items("events")}


def test_a_pod_is_ready_once_a_router_knows_it(kube: Kube, operator: OperatorProcess, router: Router) -> None:
    router.blind = True
    kube.deployment(replicas=1)
    eventually(lambda: "no router knows it yet" in waits(kube), "the status says what it waits for")
    [pod] = kube.runtime_pods()
    states = condition_states(pod)
    assert (states["ContainersReady"], states["Ready"]) == ("True", "False")
    assert naming.GATE_ROUTABLE not in states
    assert kube.condition("Ready")["status"] == "False"
    router.blind = False
    kube.wait_ready()
    [pod] = kube.runtime_pods()
    assert condition_states(pod)[naming.GATE_ROUTABLE] == "True"


def test_scale_in_drains_the_least_busy_and_can_be_taken_back(
    kube: Kube, operator: OperatorProcess, router: Router
) -> None:
    kube.deployment(replicas=2)
    kube.wait_ready()
    busy, idle = sorted(names(kube))
    router.load = {busy: 5, idle: 1}
    scale(kube, 1)
    eventually(lambda: "1 request is left" in waits(kube), "the status says what it waits for")
    assert marked(kube) == {idle}
    scale(kube, 2)
    eventually(lambda: not marked(kube), "the mark is taken back")
    kube.wait_ready()
    assert names(kube) == {busy, idle}
    scale(kube, 1)
    eventually(lambda: marked(kube) == {idle}, "it is marked again")
    assert names(kube) == {busy, idle}, "it was deleted with a request on it"
    router.load[idle] = 0
    eventually(lambda: names(kube) == {busy}, "it is deleted once it is idle")
    kube.wait_ready()
    assert {"DrainingPod", "DrainCancelled", "DeletedPod"} <= eventually(lambda: reasons(kube), "events")
    [event] = [e for e in kube.items("events") if e["reason"] == "DeletedPod"]
    assert "it is drained" in event["message"]


def test_a_drain_ends_at_its_time(kube: Kube, operator: OperatorProcess, router: Router) -> None:
    kube.deployment(replicas=2, rolloutStrategy={"drainTimeout": "2s"})
    kube.wait_ready()
    router.load = dict.fromkeys(names(kube), 7)
    scale(kube, 1)
    eventually(lambda: len(names(kube)) == 1, "it is deleted though requests are left")
    [event] = eventually(lambda: [e for e in kube.items("events") if e["reason"] == "DeletedPod"], "the event")
    assert "its time to drain is over, 7 requests are left" in event["message"]


def test_a_rollout_waits_for_routers_and_drains_each(kube: Kube, operator: OperatorProcess, router: Router) -> None:
    kube.deployment(replicas=2)
    kube.wait_ready()
    old = names(kube)
    router.load, router.blind = dict.fromkeys(old, 1), True
    kube.patch("llmdeployments", "chat", {"spec": {"image": "example.com/runtime:2"}})
    eventually(lambda: "no router knows it yet" in waits(kube), "the new pod is loaded and unknown")
    assert not marked(kube), "an old pod was told to go before the new one was known"
    router.blind = False
    first = eventually(lambda: marked(kube), "an old one drains")
    assert len(first) == 1
    assert old <= names(kube)
    [name] = first
    router.load[name] = 0
    eventually(lambda: name not in names(kube), "it goes")
    [other] = old - first
    eventually(lambda: marked(kube) == {other}, "the other one drains")
    router.load[other] = 0
    kube.wait_ready()
    assert not old & names(kube)


def test_a_drain_is_taken_up_by_the_next_operator(
    kube: Kube, start_operator: Callable[..., OperatorProcess], router: Router
) -> None:
    first = start_operator("operator-a", "--no-leader-election")
    kube.deployment(replicas=2)
    kube.wait_ready()
    router.load = dict.fromkeys(names(kube), 1)
    scale(kube, 1)
    [name] = eventually(lambda: marked(kube), "one drains")
    mark = kube.get("pods", name)["metadata"]["annotations"][MARK]
    first.kill()
    router.load[name] = 0
    assert kube.get("pods", name)["metadata"]["annotations"][MARK] == mark
    start_operator("operator-b", "--no-leader-election")
    eventually(lambda: name not in names(kube), "the next one goes on with it")
    assert len(names(kube)) == 1


@pytest.fixture
def disruption(plane: ControlPlane) -> Iterator[None]:
    """The controller that says how many pods may be evicted."""
    log = (plane.folder / "kube-controller-manager.log").open("ab")
    options = [
        "--controllers=disruption-controller",
        "--leader-elect=false",
        "--secure-port=0",
        "--bind-address=127.0.0.1",
    ]
    command = [require_binary("kube-controller-manager"), f"--kubeconfig={plane.kubeconfig()}", *options]
    process = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        yield
    finally:
        process.kill()
        process.wait(timeout=20)
        log.close()


def evict(kube: Kube, name: str) -> int:
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name}}
    return kube.http.post(kube.path("pods", name, "eviction"), json=body).status_code


@pytest.fixture
def node(kube: Kube) -> Iterator[str]:
    """The node that the played kubelet binds pods to, and the operator's right to see it."""
    role = {"metadata": {"name": f"nodes-{kube.namespace}"}}
    rules = [{"apiGroups": [""], "resources": ["nodes"], "verbs": ["get", "list", "watch"]}]
    kube.create("clusterroles", role | {"rules": rules})
    subject = {"kind": "User", "name": "operator-a", "apiGroup": "rbac.authorization.k8s.io"}
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "ClusterRole", "name": role["metadata"]["name"]}
    kube.create("clusterrolebindings", role | {"roleRef": reference, "subjects": [subject]})
    kube.call("POST", "/api/v1/nodes", json={"metadata": {"name": "n1"}})
    yield "n1"
    kube.http.delete("/api/v1/nodes/n1")
    for plural in ("clusterrolebindings", "clusterroles"):
        kube.delete(plural, role["metadata"]["name"])


def test_a_node_that_is_drained_gives_its_groups_up_one_by_one(
    kube: Kube,
    node: str,
    disruption: None,
    start_operator: Callable[..., OperatorProcess],
    kubelet: Kubelet,
    router: Router,
) -> None:
    start_operator()
    kube.deployment(replicas=2)
    kube.wait_ready()
    old = names(kube)
    router.load = dict.fromkeys(old, 1)
    eventually(lambda: kube.get("poddisruptionbudgets", "chat")["status"]["currentHealthy"] == 2, "it is counted")
    assert kube.get("poddisruptionbudgets", "chat")["spec"]["minAvailable"] == 2
    assert evict(kube, min(old)) == 429, "a serving pod was evicted"
    usual = kubelet.behaviour
    full = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "1 node is cordoned."}
    kubelet.behaviour = lambda pod: {"phase": "Pending", "conditions": [full]}
    kube.call("PATCH", f"/api/v1/nodes/{node}", content=json.dumps({"spec": {"unschedulable": True}}), headers=MERGE)
    found = eventually(lambda: (c := kube.condition("InsufficientCapacity"))["status"] == "True" and c, "no room")
    assert "cordoned" in found["message"]
    eventually(lambda: f"its node {node} is cordoned" in waits(kube), "the status says why they have to go")
    assert not marked(kube), "a pod was told to go with none to take over"
    kubelet.node, kubelet.behaviour = "n2", usual
    for pod in kube.runtime_pods():
        if pod["metadata"]["name"] not in old:
            kube.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=0)
    for _ in old:
        [name] = eventually(lambda: marked(kube), "one drains")
        router.load[name] = 0
        eventually(lambda name=name: name not in names(kube), "it goes")
    eventually(lambda: len(names(kube)) == 2 and not old & names(kube), "both have moved")
    kube.wait_ready()


def test_budgets_follow_the_deployment(
    kube: Kube, start_operator: Callable[..., OperatorProcess], kubelet: Kubelet
) -> None:
    start_operator()
    kube.deployment(replicas=3, router={"replicas": 2})
    kube.wait_ready()
    # The operator sees no nodes here, so it leaves one replica to evictions.
    assert kube.get("poddisruptionbudgets", "chat")["spec"]["minAvailable"] == 2
    assert kube.get("poddisruptionbudgets", "chat-router")["spec"]["maxUnavailable"] == 1
    kube.patch("llmdeployments", "chat", {"spec": {"replicas": 0, "router": {"replicas": 1}}})
    eventually(lambda: kube.get("poddisruptionbudgets", "chat")["spec"]["minAvailable"] == 0, "nothing to protect")
    eventually(lambda: len(kube.items("poddisruptionbudgets")) == 1, "a single router has none")
    kube.delete("llmdeployments", "chat")
    eventually(lambda: not kube.items("poddisruptionbudgets") + kube.items("controllerrevisions"), "all is gone")


def test_another_operator_with_other_images_changes_no_pod(
    kube: Kube, start_operator: Callable[..., OperatorProcess], kubelet: Kubelet
) -> None:
    def images() -> list[str]:
        return sorted(pod["spec"]["containers"][0]["image"] for pod in kube.runtime_pods())

    first = start_operator("operator-a", "--runtime-image=runtime:1", "--router-image=router:1")
    kube.deployment(replicas=2)
    kube.wait_ready()
    before = names(kube)
    router = kube.get("deployments", "chat-router")["metadata"]["generation"]
    assert first.stop() == 0
    start_operator("operator-b", "--runtime-image=runtime:2", "--router-image=router:2")
    scale(kube, 3)
    kube.wait_ready()
    assert before < names(kube)
    assert images() == ["runtime:1"] * 3, "replicas of one revision are alike"
    assert kube.get("deployments", "chat-router")["metadata"]["generation"] == router
    wish = {"metadata": {"annotations": {"inference.wherry.dev/rollout": "1"}}}
    kube.patch("llmdeployments", "chat", wish)
    eventually(lambda: images() == ["runtime:2"] * 3, "new pods were asked for")
    [container] = kube.get("deployments", "chat-router")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == "router:2"
    kube.wait_ready()
    eventually(lambda: len(kube.items("controllerrevisions")) == 1, "the old record is gone")
