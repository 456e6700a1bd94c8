"""Lost nodes as an operator finds them that may read neither nodes nor Leases: it serves one namespace only.

A node is a process that answers for its kubelet and for its pods; to kill it is to kill the node.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.operator.control_plane import ControlPlane
from tests.operator.harness import Kube, Kubelet, OperatorProcess, audit, eventually, running

pytestmark = pytest.mark.alone

CREATED_WITHIN_S = 10.0
PODS = 4  # addresses that a node has for pods
# It needs no certificate: whoever answers a TLS hello with anything is alive.
NODE = """
import http.server, sys, threading
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.server.server_port in mute:
            self.log_message()
            threading.Event().wait()
        self.send_response(200)
        self.send_header("Content-Length", "0")
        self.end_headers()
    def log_message(self, *_):
        print("asked", self.server.server_address[0], flush=True)
mute = [int(port) for port in sys.argv[1].split()]
for word in sys.argv[2:]:
    host, port = word.split(":")
    server = http.server.ThreadingHTTPServer((host, int(port)), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
print("up", flush=True)
threading.Event().wait()
"""


class PlayedNode:
    def __init__(self, name: str, network: str, log: Path, mute: str) -> None:
        """`mute`: ports on which it takes connections and says nothing."""
        self.name, self.host, self._log, self._mute = name, f"{network}.1", log, mute
        self.free = [f"{network}.{10 + index}" for index in range(PODS)]
        self._listen = [f"{self.host}:10250", *(f"{ip}:8000" for ip in self.free)]
        self.start()

    def start(self) -> None:
        with self._log.open("w") as log:
            self._process = subprocess.Popen([sys.executable, "-c", NODE, self._mute, *self._listen], stdout=log)
        eventually(lambda: "up" in self._log.read_text(), "the node is up")

    def asked(self, address: str) -> bool:
        """Whether anybody asked for something at that address since it started."""
        return f"asked {address}\n" in self._log.read_text()

    def kill(self) -> float:
        """Returns when it was killed, on the monotonic clock."""
        self._process.send_signal(signal.SIGKILL)
        self._process.wait(timeout=20)
        return time.monotonic()


class Nodes:
    """Three of them; each pod goes to the next that lives."""

    def __init__(self, kube: Kube, folder: Path, mute: str) -> None:
        self._kube = kube
        network = 232 + os.getpid() % 20  # above those of local mode
        self.all = [PlayedNode(f"n{i}", f"127.{network}.{i}", folder / f"n{i}.log", mute) for i in range(3)]
        self.dead: set[str] = set()
        self._turn = 0

    def place(self, pod: dict[str, Any]) -> dict[str, Any]:
        """Binds a pod, and gives the status of one that runs there."""
        living = [node for node in self.all if node.name not in self.dead]
        node = living[self._turn % len(living)]
        self._turn += 1
        name = pod["metadata"]["name"]
        target = {"apiVersion": "v1", "kind": "Node", "name": node.name}
        binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
        self._kube.call("POST", self._kube.path("pods", name, "binding"), json=binding)
        return running(node.free.pop()) | {"hostIP": node.host, "hostIPs": [{"ip": node.host}]}

    def kill(self, *names: str) -> float:
        self.dead |= set(names)
        return max(node.kill() for node in self.all if node.name in names)


@pytest.fixture
def nodes(kube: Kube, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Nodes]:
    nodes = Nodes(kube, tmp_path, getattr(request, "param", ""))
    yield nodes
    for node in nodes.all:
        node.kill()


def pods_by_node(kube: Kube) -> dict[str, dict[str, Any]]:
    return {pod["spec"].get("nodeName", ""): pod for pod in kube.runtime_pods()}


def deployed(kube: Kube, nodes: Nodes) -> dict[str, dict[str, Any]]:
    """Three replicas, by their nodes. The operator has asked each of them, and each kubelet."""
    kube.deployment(replicas=3)

    def known() -> dict[str, dict[str, Any]] | None:
        pods = pods_by_node(kube)
        asked = [n.asked(n.host) and n.asked(pods[n.name]["status"]["podIP"]) for n in nodes.all if n.name in pods]
        return pods if len(asked) == 3 and all(asked) else None

    return dict(eventually(known, "three pods run, and the operator knows them"))


@pytest.mark.parametrize("nodes", [pytest.param("", id="idle"), pytest.param("8000", id="too-busy")], indirect=True)
def test_a_node_dies(plane: ControlPlane, kube: Kube, operator: OperatorProcess, nodes: Nodes) -> None:
    with Kubelet(kube, nodes.place):
        before = deployed(kube, nodes)
        assert "nodes may not be read" in operator.text()
        names = {pod["metadata"]["name"] for pod in before.values()}
        killed = nodes.kill("n1")
        new = eventually(
            lambda: [p for p in kube.runtime_pods() if p["metadata"]["name"] not in names], "a replacement", 30
        )
        assert time.monotonic() - killed <= CREATED_WITHIN_S
        assert new[0]["metadata"]["annotations"]["inference.wherry.dev/avoided-nodes"] == "n1"
        lost = before["n1"]["metadata"]["name"]
        eventually(lambda: lost not in {p["metadata"]["name"] for p in kube.runtime_pods()}, "the lost pod is deleted")
        kept = {p["metadata"]["uid"] for p in kube.runtime_pods()}
        assert {before[name]["metadata"]["uid"] for name in ("n0", "n2")} <= kept
        deleted = [e["name"] for e in audit(plane, kube.namespace) if e["verb"] == "delete" and e["user"] != "admin"]
        assert deleted == [lost]


def test_most_of_them_die_and_nothing_is_deleted(
    plane: ControlPlane, kube: Kube, operator: OperatorProcess, nodes: Nodes
) -> None:
    with Kubelet(kube, nodes.place):
        before = deployed(kube, nodes)
        nodes.kill("n0", "n1")
        found = eventually(
            lambda: (c := kube.condition("Degraded")).get("reason") == "OperatorIsolated" and c, "it says so"
        )
        assert "2 of 3 nodes" in found["message"]
        for node in nodes.all[:2]:
            node.start()
        eventually(lambda: kube.condition("Degraded")["reason"] != "OperatorIsolated", "it sees them again")
        assert {p["metadata"]["uid"] for p in kube.runtime_pods()} == {p["metadata"]["uid"] for p in before.values()}
        written = [
            e for e in audit(plane, kube.namespace) if e["verb"] in ("create", "delete") and e["user"] != "admin"
        ]
        assert len([e for e in written if e["verb"] == "create"]) == 3
        assert not [e for e in written if e["verb"] == "delete"]
