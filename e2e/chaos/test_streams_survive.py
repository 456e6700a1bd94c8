"""Streams go on while the cluster moves: nodes killed and drained, pods, routers and the operator replaced."""

import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from datetime import datetime
from typing import Any

import pytest
from e2e.conftest import Install
from e2e.kube import RUNTIME, Cluster, eventually, example
from e2e.load import Streams

pytestmark = pytest.mark.timeout(600)
ROUTER = "app.kubernetes.io/component=router"
ALL = "app.kubernetes.io/part-of=wherry"
MIB = 1 << 20


def workers(cluster: Cluster) -> list[str]:
    """Names of the worker nodes, which are also those of their containers."""
    nodes = cluster.get("default", "nodes", "-l", "!node-role.kubernetes.io/control-plane")["items"]
    return sorted(node["metadata"]["name"] for node in nodes)


def engine() -> str:
    """What runs the nodes' containers."""
    found = subprocess.run(
        ["docker", "ps", "--filter=name=wherry-e2e", "-q"], capture_output=True, text=True, check=False
    )
    return "docker" if found.returncode == 0 and found.stdout.strip() else "podman"


@pytest.fixture(scope="module")
def steady(cluster: Cluster, install: Install, namespace: str) -> str:
    """Two replicas, one on each worker; the router and the operator are on the first. Gives the second's name."""
    first, second = workers(cluster)
    cluster.kubectl("cordon", second)
    try:
        install()
        cluster.apply(namespace, chat(1))
        cluster.wait_ready(namespace, "chat", 1)
    finally:
        cluster.kubectl("uncordon", second)
    cluster.kubectl("-n", namespace, "scale", "llmd/chat", "--replicas=2")
    cluster.wait_ready(namespace, "chat", 2)
    assert {pod["spec"]["nodeName"] for pod in cluster.pods(namespace)} == {first, second}
    return second


@pytest.fixture(scope="module")
def url(cluster: Cluster, namespace: str, steady: str) -> str:
    return cluster.node_port(namespace, "chat")


# Engines take what they get; routers, the operator, kubelets and the API server are to have their part, too.
RESOURCES = {"requests": {"cpu": "100m", "memory": "768Mi"}, "limits": {"cpu": "400m", "memory": "1Gi"}}


def chat(replicas: int, **spec: Any) -> dict[str, Any]:
    return example(replicas=replicas, resources=RESOURCES, **spec)


def identities(pods: list[dict[str, Any]]) -> set[tuple[str, int]]:
    return {(p["metadata"]["uid"], sum(s["restartCount"] for s in p["status"]["containerStatuses"])) for p in pods}


def check(streams: Streams, at_least: int) -> None:
    """Nothing was lost, and the figures for who reads the log."""
    print(f"{streams.answered} streams, {len(streams.failures)} failed, gap p99 {streams.gap_p99:.2f} s")
    assert not streams.failures
    assert streams.answered >= at_least


@contextmanager
def node_down(node: str) -> Iterator[float]:
    """A node that is killed, until the block ends. Gives when."""
    killed = time.time()
    subprocess.run([engine(), "kill", node], check=True, capture_output=True)
    try:
        yield killed
    finally:
        subprocess.run([engine(), "start", node], check=True, capture_output=True)


def replaced(cluster: Cluster, namespace: str, known: set[str], killed: float) -> None:
    """Waits for a pod that is none of `known` (UIDs), which must have been made within 10 s."""
    new = eventually(
        "a replacement",
        lambda: [p for p in cluster.pods(namespace, RUNTIME) if p["metadata"]["uid"] not in known],
    )
    created = datetime.fromisoformat(new[0]["metadata"]["creationTimestamp"]).timestamp()
    print(f"replacement created {created - killed:.1f} s after the kill (to the second)")
    assert created - killed <= 10


def uids(pods: list[dict[str, Any]]) -> set[str]:
    return {pod["metadata"]["uid"] for pod in pods}


def flowing(streams: Streams, more: int = 20) -> None:
    """Waits for so many more streams to end as they should."""
    before = streams.answered
    eventually("streams", lambda: streams.failures or streams.answered >= before + more)


def test_a_killed_node(cluster: Cluster, namespace: str, steady: str, url: str) -> None:
    """Under 50 streams. The replacement is there within 10 s, and what the node brings back is harmless."""
    (victim,) = [pod for pod in cluster.pods(namespace) if pod["spec"]["nodeName"] == steady]
    known = uids(cluster.pods(namespace))
    with ExitStack() as down:
        with Streams(url, clients=50) as streams:
            flowing(streams, 50)
            killed = down.enter_context(node_down(steady))
            replaced(cluster, namespace, known, killed)
            flowing(streams, 50)
        check(streams, 100)
        assert streams.gap_p99 < 2
        cluster.wait_ready(namespace, "chat", 2)
    with Streams(url, clients=2, max_tokens=150) as streams:
        cluster.kubectl("wait", "--for=condition=Ready", f"node/{steady}", "--timeout=180s")
        eventually(
            "the old pod to be gone",
            lambda: victim["metadata"]["uid"] not in str(cluster.get(namespace, "pods", "-l", RUNTIME)),
            180,
        )
        flowing(streams)
    check(streams, 20)
    cluster.wait_ready(namespace, "chat", 2)


@pytest.fixture
def groups(cluster: Cluster, namespace: str, steady: str) -> dict[str, str]:
    """Two groups of two ranks: one whole on the first node, one whose second rank is on the other. Gives their nodes.

    On the first node is room for three ranks and no more: another pod holds what else it has.
    """
    first = next(name for name in workers(cluster) if name != steady)
    cluster.kubectl("cordon", steady)
    try:
        cluster.apply(namespace, chat(1, parallelism={"tensor": 2, "ranksPerPod": 1}))
        cluster.wait_ready(namespace, "chat", 1)
        cluster.apply(namespace, hold(first, cluster.free_memory(first) - int(1.5 * 768 * MIB)))
        cluster.kubectl("-n", namespace, "scale", "llmd/chat", "--replicas=2")
        eventually("the second group's leader", lambda: len(placed(cluster, namespace)) == 3)
    finally:
        cluster.kubectl("uncordon", steady)
    cluster.wait_ready(namespace, "chat", 2)
    cluster.kubectl("-n", namespace, "delete", "pod", "hold", "--grace-period=1")
    return placed(cluster, namespace)


def placed(cluster: Cluster, namespace: str) -> dict[str, str]:
    """The nodes of the pods that have one."""
    pods = {pod["metadata"]["name"]: pod["spec"].get("nodeName", "") for pod in cluster.pods(namespace)}
    return {name: node for name, node in pods.items() if node}


def hold(node: str, memory: int) -> dict[str, Any]:
    """A pod that asks for so much of a node's memory. It need not run for that, and its image does not exist."""
    restricted = {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "runAsNonRoot": True,
        "seccompProfile": {"type": "RuntimeDefault"},
    }
    container = {
        "name": "hold",
        "image": "localhost/none:none",
        "imagePullPolicy": "Never",
        "resources": {"requests": {"memory": str(memory)}},
        "securityContext": restricted,
    }
    spec = {"nodeName": node, "containers": [container], "terminationGracePeriodSeconds": 0}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "hold"}, "spec": spec}


def test_a_group_on_two_nodes_loses_one(
    cluster: Cluster, namespace: str, steady: str, url: str, groups: dict[str, str]
) -> None:
    """The node of the rank that does not lead. Its streams go on in the other group."""
    [lost] = [name for name, node in groups.items() if node == steady]
    assert lost.endswith("-1"), groups
    known = uids(cluster.pods(namespace))
    with Streams(url, clients=20, max_tokens=300) as streams:
        flowing(streams, 40)
        with node_down(steady) as killed:
            replaced(cluster, namespace, known, killed)
            flowing(streams, 40)
        cluster.kubectl("wait", "--for=condition=Ready", f"node/{steady}", "--timeout=180s")
        cluster.wait_ready(namespace, "chat", 2)
    check(streams, 80)
    assert streams.gap_p99 < 2


@pytest.fixture(scope="module")
def two_routers(cluster: Cluster, namespace: str, steady: str) -> None:
    """One alone could not be replaced or evicted without a gap."""
    cluster.apply(namespace, chat(2, router={"replicas": 2}))
    cluster.wait_ready(namespace, "chat", 2)
    cluster.kubectl("-n", namespace, "rollout", "status", "deployment/chat-router", "--timeout=180s")


@pytest.mark.usefixtures("two_routers")
def test_scale_and_rollout(cluster: Cluster, namespace: str, url: str) -> None:
    with Streams(url, clients=6, max_tokens=150) as streams:
        flowing(streams)
        for replicas in (3, 1, 3, 2):
            cluster.kubectl("-n", namespace, "scale", "llmd/chat", f"--replicas={replicas}")
            cluster.wait_ready(namespace, "chat", replicas)
        cluster.patch(namespace, "chat", {"spec": {"batching": {"maxRunning": 48}}})
        cluster.wait_ready(namespace, "chat", 2)
        flowing(streams)
    check(streams, 40)


@pytest.mark.usefixtures("two_routers")
def test_router_rollout_and_operator_upgrade(cluster: Cluster, install: Install, namespace: str, url: str) -> None:
    """The router's pod is exchanged under streams. Then the operator is, for one that would make pods of other images:
    no pod of the deployment changes in 60 s."""
    with Streams(url, clients=6, max_tokens=150) as streams:
        flowing(streams)
        old = uids(cluster.pods(namespace, ROUTER))
        cluster.kubectl("-n", namespace, "rollout", "restart", "deployment/chat-router")
        cluster.kubectl("-n", namespace, "rollout", "status", "deployment/chat-router", "--timeout=180s")
        eventually(
            "the old router to end its streams",
            lambda: not old & uids(cluster.get(namespace, "pods", "-l", ROUTER)["items"]),
        )
        before = identities(cluster.pods(namespace, ALL))
        install("images.runtime.tag=of-the-next-release", "images.router.tag=of-the-next-release")
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            assert identities(cluster.pods(namespace, ALL)) == before
            time.sleep(2)
        flowing(streams)
    check(streams, 40)


@pytest.mark.usefixtures("two_routers")
def test_a_drained_node(cluster: Cluster, namespace: str, steady: str, url: str) -> None:
    """`kubectl drain` waits until a replacement serves elsewhere, and ends."""
    with Streams(url, clients=6, max_tokens=150) as streams:
        flowing(streams)
        try:
            options = ["--ignore-daemonsets", "--delete-emptydir-data", "--timeout=180s", f"--pod-selector={ALL}"]
            cluster.run("kubectl", "drain", steady, *options)
            assert all(pod["spec"]["nodeName"] != steady for pod in cluster.pods(namespace))
            flowing(streams)
        finally:
            cluster.kubectl("uncordon", steady)
    check(streams, 40)
    cluster.wait_ready(namespace, "chat", 2)
