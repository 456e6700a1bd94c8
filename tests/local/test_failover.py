"""Node failover for real: nodes and processes are killed and frozen; the operator, routers and scheduler are real.

The worker is a small program in the engine's place: groups, probes and moves are the same, and it loads at once.
"""

import json
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from tests.local.harness import TestCluster, eventually, python

from wherry_local.paths import project_root
from wherry_local.processes import Identity, marked

pytestmark = pytest.mark.alone

# Answers as a worker does. In a group it is ready once all ranks have met, and ends as soon as one of them is gone.
WORKER = """
import http.server, os, socket, sys, threading
ip, size = os.environ["POD_IP"], int(os.environ.get("LWS_GROUP_SIZE", "1"))
index, token = int(os.environ.get("LWS_WORKER_INDEX", "0")), os.environ["WHERRY_GROUP"].encode()
met = threading.Event()
if os.path.exists(os.environ.get("BROKEN", "/nonexistent")):
    sys.exit("no accelerator here")
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path != "/ready" or met.is_set() else 503)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_): pass
def lost(peer):
    peer.recv(1)
    print("peer lost: a rank of the group is gone", flush=True)
    os._exit(1)
def lead():
    with socket.create_server((ip, 8001)) as server:
        peers = []
        while len(peers) < size - 1:
            peer, _ = server.accept()
            if peer.recv(64) == token:
                peers.append(peer)
    met.set()
    for peer in peers:
        threading.Thread(target=lost, args=(peer,)).start()
def follow():
    while not met.is_set():
        try:
            peer = socket.create_connection((os.environ["LWS_LEADER_ADDRESS"], 8001), timeout=30)
            peer.sendall(token)
            peer.settimeout(None)
            met.set()
        except OSError:
            met.wait(0.1)
    lost(peer)
threading.Thread(target=http.server.ThreadingHTTPServer((ip, 8000), Handler).serve_forever, daemon=True).start()
print("serving", flush=True)
follow() if index else lead()
threading.Event().wait()
"""

DEPLOYMENT = "inference.wherry.dev/deployment"
RUNTIME = "app.kubernetes.io/component=runtime"
CREATED_WITHIN_S = 10.0


@pytest.fixture(scope="module")
def wherry(three_nodes: TestCluster) -> TestCluster:
    return three_nodes


@pytest.fixture(autouse=True)
def whole(wherry: TestCluster) -> Iterator[None]:
    """Every test finds all nodes and leaves nothing behind."""
    yield
    for name in wherry.cluster.node_names():
        wherry.cluster.start_node(name)
    wherry.kubectl("delete", "llmd", "--all", "--wait=false")
    gone(wherry)
    eventually(lambda: all(ready(node) for node in items(wherry, "nodes")), "all nodes are Ready", 60)
    eventually(lambda: not any(node["spec"].get("taints") for node in items(wherry, "nodes")), "no taints", 60)


def gone(wherry: TestCluster) -> None:
    """Waits until nothing of any LLMDeployment is left; says what is, if it stays."""

    def left() -> list[dict[str, Any]]:
        return [*items(wherry, "llmd"), *items(wherry, "pods")]

    try:
        eventually(lambda: not left(), "all is gone", 90)
    except AssertionError as error:
        raise AssertionError(f"{error}\n{yaml.safe_dump_all(left())}") from None


def items(wherry: TestCluster, kind: str, selector: str = "") -> list[dict[str, Any]]:
    chosen = ["-l", selector] if selector else []
    return list(json.loads(wherry.kubectl("get", kind, *chosen, "-o", "json"))["items"])


def ready(raw: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in raw.get("status", {}).get("conditions", []))


def llmd(name: str, environment: dict[str, str] | None = None, **spec: Any) -> dict[str, Any]:
    container: dict[str, Any] = {"name": "runtime", "command": list(python(WORKER))}
    if environment:
        container["env"] = [{"name": key, "value": value} for key, value in environment.items()]
    base = {
        "model": {"name": name, "uri": "sample://tiny"},
        "rolloutStrategy": {"drainTimeout": "2s"},
        "podTemplate": {"spec": {"containers": [container]}},
    }
    return {
        "apiVersion": "inference.wherry.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name, "namespace": "default"},
        "spec": base | spec,
    }


TWO_PODS = {"parallelism": {"tensor": 2, "ranksPerPod": 1}}


class Replicas:
    """One LLMDeployment and its runtime pods."""

    def __init__(self, wherry: TestCluster, name: str, **spec: Any) -> None:
        self.wherry, self.name = wherry, name
        if spec.pop("make", True):
            wherry.apply(llmd(name, **spec))

    @classmethod
    def of(cls, wherry: TestCluster, name: str) -> "Replicas":
        """Those of an LLMDeployment that exists."""
        return cls(wherry, name, make=False)

    def pods(self) -> dict[str, dict[str, Any]]:
        """By name, those too that are being deleted."""
        found = items(self.wherry, "pods", f"{DEPLOYMENT}={self.name},{RUNTIME}")
        return {pod["metadata"]["name"]: pod for pod in found}

    def staying(self) -> dict[str, dict[str, Any]]:
        return {name: pod for name, pod in self.pods().items() if "deletionTimestamp" not in pod["metadata"]}

    def status(self) -> dict[str, Any]:
        return dict(self.wherry.get("llmd", self.name).get("status", {}))

    def condition(self, kind: str) -> dict[str, Any]:
        return next((c for c in self.status().get("conditions", []) if c["type"] == kind), {})

    def wait_ready(self, pods: int, timeout_s: float = 60) -> dict[str, dict[str, Any]]:
        """Waits until the LLMDeployment is Ready with that many pods; returns them."""

        def whole() -> dict[str, dict[str, Any]] | None:
            staying = self.staying()
            serving = len(staying) == pods and all(ready(pod) for pod in staying.values())
            return staying if serving and self.condition("Ready").get("status") == "True" else None

        return dict(eventually(whole, f"{self.name} has {pods} ready pods", timeout_s) or {})

    def takes_over(self, old: set[str], killed: float) -> dict[str, dict[str, Any]]:
        """Waits for pods that are not among `old`; they must be there in time, on the clock and on the API server's."""
        new = eventually(
            lambda: {name: pod for name, pod in self.staying().items() if name not in old}, "a replacement", 30
        )
        took = time.monotonic() - killed
        assert took <= CREATED_WITHIN_S, f"{took:.1f} s"
        return new


def node_of(pod: dict[str, Any]) -> str:
    return str(pod["spec"]["nodeName"])


@pytest.mark.parametrize("how", ["kill_node", "freeze_node"])
def test_a_node_dies_under_one_replica(wherry: TestCluster, how: str) -> None:
    one = Replicas(wherry, how.replace("_", "-"))
    [(name, pod)] = one.wait_ready(1).items()
    killed = time.monotonic()
    getattr(wherry.cluster, how)(node_of(pod))
    [replacement] = one.takes_over({name}, killed).values()
    required = replacement["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
    avoided = [field["values"] for term in required["nodeSelectorTerms"] for field in term["matchFields"]]
    assert avoided == [[node_of(pod)]]
    [running] = one.wait_ready(1).values()
    assert node_of(running) != node_of(pod)
    # The dead node's pod is deleted, and not by force: its object stays until its node says that it is gone.
    assert one.pods()[name]["metadata"]["deletionTimestamp"]
    wherry.cluster.start_node(node_of(pod))
    eventually(lambda: list(one.pods()) == [running["metadata"]["name"]], "the returned node ends the old pod", 60)
    assert one.pods()[running["metadata"]["name"]]["metadata"]["uid"] == running["metadata"]["uid"]


def test_the_node_of_a_groups_second_pod_is_killed(wherry: TestCluster) -> None:
    pair = Replicas(wherry, "pair", **TWO_PODS)
    old = pair.wait_ready(2)
    leader, follower = old[min(old)], old[max(old)]
    assert node_of(leader) != node_of(follower), "the scheduler spreads a group's pods where it can"
    assert pair.status()["replicas"] == 1
    killed = time.monotonic()
    wherry.cluster.kill_node(node_of(follower))
    pair.takes_over(set(old), killed)
    new = pair.wait_ready(2)
    assert not set(new) & set(old)
    assert node_of(follower) not in {node_of(pod) for pod in new.values()}
    [group] = {pod["metadata"]["labels"]["inference.wherry.dev/group"] for pod in new.values()}
    assert group not in min(old)
    wherry.cluster.start_node(node_of(follower))
    eventually(lambda: pair.pods().keys() == new.keys(), "nothing of the old group is left", 60)


def test_the_node_of_the_router_is_killed(wherry: TestCluster) -> None:
    replicas = Replicas(wherry, "routed", replicas=3)
    replicas.wait_ready(3)
    chosen = f"{DEPLOYMENT}=routed,app.kubernetes.io/component=router"
    [router] = items(wherry, "pods", chosen)
    killed = time.monotonic()
    wherry.cluster.kill_node(node_of(router))

    def routers() -> dict[str, dict[str, Any]]:
        found = {pod["metadata"]["name"]: pod for pod in items(wherry, "pods", chosen)}
        return {name: pod for name, pod in found.items() if "deletionTimestamp" not in pod["metadata"]}

    eventually(lambda: (now := routers()) and router["metadata"]["name"] not in now, "another router", 30)
    assert time.monotonic() - killed <= CREATED_WITHIN_S
    eventually(lambda: any(ready(pod) for pod in routers().values()), "it serves", 60)


def test_a_rank_dies_and_the_group_meets_again_in_place(wherry: TestCluster) -> None:
    pair = Replicas(wherry, "again", **TWO_PODS)
    before = pair.wait_ready(2)
    kill_worker(before[max(before)])
    eventually(lambda: restarts(pair.pods()) == [1, 1], "both ranks restart", 60)
    after = pair.wait_ready(2)
    assert {p["metadata"]["uid"] for p in after.values()} == {p["metadata"]["uid"] for p in before.values()}
    message = after[min(after)]["status"]["containerStatuses"][0]["lastState"]["terminated"]["message"]
    assert "peer lost" in message


def test_a_group_that_cannot_work_is_replaced_and_says_why(wherry: TestCluster) -> None:
    flag = wherry.home.root / "broken"
    flag.touch()
    limits = {"failover": {"maxGroupRestarts": 2}}
    worn = Replicas(wherry, "worn", environment={"BROKEN": str(flag)}, **limits)
    first = eventually(worn.pods, "the first pod")
    eventually(lambda: worn.staying() and not set(worn.staying()) & set(first), "a new group takes its place", 60)
    degraded = eventually(
        lambda: (c := worn.condition("Degraded")).get("reason") == "RestartsExhausted" and c, "the cause is told"
    )
    assert degraded["status"] == "True"
    assert "no accelerator here" in degraded["message"]
    flag.unlink()
    worn.wait_ready(1, timeout_s=90)
    assert worn.condition("Degraded")["status"] == "False"


def test_most_nodes_look_lost_and_nothing_is_deleted(wherry: TestCluster) -> None:
    many = Replicas(wherry, "many", replicas=3)
    before = many.wait_ready(3)
    nodes = sorted({node_of(pod) for pod in before.values()})
    assert len(nodes) == 3
    for name in nodes[:2]:
        wherry.cluster.kill_node(name)
    degraded = eventually(
        lambda: (c := many.condition("Degraded")).get("reason") == "OperatorIsolated" and c, "it suspects itself", 30
    )
    assert degraded["status"] == "True"
    assert "2 of 3 nodes" in degraded["message"]
    assert many.pods().keys() == many.staying().keys() == before.keys()
    for name in nodes[:2]:
        wherry.cluster.start_node(name)
    eventually(lambda: many.condition("Degraded").get("reason") != "OperatorIsolated", "it sees them again", 60)
    many.wait_ready(3, timeout_s=90)


def test_a_frozen_operator_blames_nobody_when_it_wakes(wherry: TestCluster) -> None:
    one = Replicas(wherry, "awake", replicas=2)
    before = one.wait_ready(2)
    operator = Identity.from_json(wherry.cluster.state()["components"]["wherry-operator"])
    assert operator is not None
    log = wherry.home.log("wherry-operator")
    operator.send(signal.SIGSTOP)
    try:
        stopped = time.monotonic()
        eventually(lambda: time.monotonic() - stopped > 3 * CREATED_WITHIN_S / 2, "longer than nodeUnreachable", 60)
    finally:
        operator.send(signal.SIGCONT)
    eventually(lambda: "stood still" in log.read_text(), "it knows that it slept")
    # It works again, and has looked at everything since.
    wherry.kubectl("patch", "llmd", "awake", "--type=merge", "-p", '{"spec":{"router":{"replicas":2}}}')
    eventually(lambda: wherry.get("deployment", "awake-router")["spec"]["replicas"] == 2, "the operator acts", 60)
    assert {p["metadata"]["uid"] for p in one.pods().values()} == {p["metadata"]["uid"] for p in before.values()}
    assert one.staying().keys() == before.keys()


def test_without_room_it_says_so_and_recovers_when_the_node_returns(wherry: TestCluster) -> None:
    node = items(wherry, "nodes")[0]["metadata"]["name"]
    only = Replicas(wherry, "only", nodeSelector={"kubernetes.io/hostname": node})
    [(name, _)] = only.wait_ready(1).items()
    killed = time.monotonic()
    wherry.cluster.kill_node(node)
    only.takes_over({name}, killed)
    lacking = eventually(
        lambda: (c := only.condition("InsufficientCapacity")).get("status") == "True" and c, "room lacks", 30
    )
    assert "nodes are available" in lacking["message"]
    wherry.cluster.start_node(node)
    [serving] = only.wait_ready(1, timeout_s=120)
    assert serving != name
    assert only.condition("InsufficientCapacity")["status"] == "False"


def test_the_engine_itself_in_two_pods(wherry: TestCluster) -> None:
    wherry.kubectl("apply", "-f", str(project_root() / "examples" / "two-pods.yaml"))
    pair = Replicas.of(wherry, "chat-two-pods")
    old = pair.wait_ready(2, timeout_s=120)
    killed = time.monotonic()
    wherry.cluster.kill_node(node_of(old[max(old)]))
    pair.takes_over(set(old), killed)
    assert not set(pair.wait_ready(2, timeout_s=120)) & set(old)


def restarts(pods: dict[str, dict[str, Any]]) -> list[int]:
    return [pod["status"]["containerStatuses"][0]["restartCount"] for pod in pods.values()]


def kill_worker(pod: dict[str, Any]) -> None:
    """SIGKILL to the process in the engine's place, and nothing else."""
    [pid] = [pid for pid in marked("POD_NAME", pod["metadata"]["name"]) if b"8001" in _command(pid)]
    os.kill(pid, signal.SIGKILL)


def _command(pid: int) -> bytes:
    with open(f"/proc/{pid}/cmdline", "rb") as file:
        return file.read()
