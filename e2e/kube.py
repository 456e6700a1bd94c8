"""kubectl and helm as the cases use them, and waiting with a deadline."""

import json
import os
import socket
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import yaml
from kubernetes.utils import parse_quantity

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
RUNTIME = "app.kubernetes.io/component=runtime"


class CommandError(Exception):
    """A command failed; the text has what it wrote."""


def eventually(what: str, look: Callable[[], T | None], timeout: float = 120) -> T:
    """Looks until `look` gives something true, and returns that.

    Raises:
        TimeoutError: it never did; the text has what was seen last, or why looking failed.
    """
    deadline = time.monotonic() + timeout
    last: object = None
    while time.monotonic() < deadline:
        try:
            last = found = look()
            if found:
                return found
        except (CommandError, AssertionError, LookupError) as error:
            last = error
        time.sleep(0.5)
    raise TimeoutError(f"waited {timeout:.0f} s for: {what}; seen last: {last}")


@dataclass(frozen=True)
class Cluster:
    """The e2e cluster. `images` are the references that its workers hold, by target."""

    kubeconfig: Path
    binaries: Path
    images: dict[str, str]

    def environment(self) -> dict[str, str]:
        return os.environ | {"KUBECONFIG": str(self.kubeconfig), "PATH": f"{self.binaries}:{os.environ['PATH']}"}

    def run(self, *command: str, stdin: str | None = None, timeout: float = 300) -> str:
        """Runs a command; returns what it printed."""
        result = subprocess.run(
            command, input=stdin, capture_output=True, text=True, env=self.environment(), timeout=timeout, check=False
        )
        if result.returncode:
            raise CommandError(f"{' '.join(command)}: {result.stderr.strip() or result.stdout.strip()}")
        return result.stdout

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        return self.run("kubectl", *arguments, stdin=stdin)

    def get(self, namespace: str, *arguments: str) -> Any:
        return json.loads(self.kubectl("-n", namespace, "get", *arguments, "-o", "json"))

    def apply(self, namespace: str, manifest: dict[str, Any]) -> None:
        self.kubectl("-n", namespace, "apply", "-f", "-", stdin=yaml.safe_dump(manifest))

    def patch(self, namespace: str, name: str, patch: dict[str, Any]) -> None:
        self.kubectl("-n", namespace, "patch", "llmd", name, "--type=merge", "-p", json.dumps(patch))

    def pods(self, namespace: str, selector: str = RUNTIME) -> list[dict[str, Any]]:
        """Pods that are not being deleted."""
        found = self.get(namespace, "pods", "-l", selector)["items"]
        return [pod for pod in found if "deletionTimestamp" not in pod["metadata"]]

    def status(self, namespace: str, name: str) -> dict[str, Any]:
        return dict(self.get(namespace, "llmd", name).get("status", {}))

    def condition(self, namespace: str, name: str, kind: str) -> dict[str, Any]:
        conditions = self.status(namespace, name).get("conditions", [])
        return next((c for c in conditions if c["type"] == kind), {})

    def wait_ready(self, namespace: str, name: str, replicas: int, timeout: float = 240) -> None:
        """Waits until so many replicas, and no more, are ready and current, and the resource says Ready."""

        def settled() -> bool:
            resource = self.get(namespace, "llmd", name)
            status = resource.get("status", {})
            counts = [status.get(key) for key in ("replicas", "readyReplicas", "updatedReplicas")]
            conditions = {c["type"]: c["status"] for c in status.get("conditions", [])}
            assert status.get("observedGeneration") == resource["metadata"]["generation"], status
            assert counts == [replicas] * 3, status
            assert conditions.get("Ready") == "True", conditions
            return True

        eventually(f"{name} with {replicas} ready replicas", settled, timeout)

    @contextmanager
    def service(self, namespace: str, name: str) -> Iterator[str]:
        """A URL that leads to the Service's port `http`, through the API server to whichever pod is behind it now."""
        with self._background("proxy", "--port=0", "--address=127.0.0.1") as line:
            yield f"http://{line.split()[-1]}/api/v1/namespaces/{namespace}/services/{name}:http/proxy"

    def free_memory(self, node: str) -> int:
        """Bytes that no pod on the node has asked for."""
        allocatable = self.get("default", "node", node)["status"]["allocatable"]
        pods = json.loads(self.kubectl("get", "pods", "-A", f"--field-selector=spec.nodeName={node}", "-o", "json"))
        containers = [container for pod in pods["items"] for container in pod["spec"]["containers"]]
        requests = [c.get("resources", {}).get("requests", {}).get("memory", "0") for c in containers]
        free = parse_quantity(allocatable["memory"]) - sum(map(parse_quantity, requests))
        return int(free)

    def node_port(self, namespace: str, name: str) -> str:
        """A URL that leads to what is behind a Service as clients in the cluster reach it, without the API server.

        Makes a second Service for it, which goes with the namespace.
        """
        spec = self.get(namespace, "service", name)["spec"]
        port = {"name": "http", "port": spec["ports"][0]["port"], "targetPort": "http"}
        outside = {"type": "NodePort", "selector": spec["selector"], "ports": [port]}
        metadata = {"name": f"{name}-outside"}
        self.apply(namespace, {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": outside})
        [chosen] = self.get(namespace, "service", f"{name}-outside")["spec"]["ports"]
        [node, *_] = self.get(namespace, "nodes", "-l", "node-role.kubernetes.io/control-plane")["items"]
        address = next(a["address"] for a in node["status"]["addresses"] if a["type"] == "InternalIP")
        eventually("the node's rules for its port", lambda: answers(address, chosen["nodePort"]), 60)
        return f"http://{address}:{chosen['nodePort']}"

    @contextmanager
    def forward(self, namespace: str, target: str, port: int) -> Iterator[str]:
        """A port-forward, which leads to one pod; gives `http://127.0.0.1:PORT`."""
        with self._background("-n", namespace, "port-forward", "--address=127.0.0.1", target, f":{port}") as line:
            yield f"http://{line.split()[2]}"

    @contextmanager
    def _background(self, *arguments: str) -> Iterator[str]:
        """Runs kubectl until the block ends; gives the first line that it prints, which says where it listens."""
        command = ["kubectl", *arguments]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=self.environment()) as process:
            try:
                assert process.stdout is not None
                line = process.stdout.readline()
                if "127.0.0.1" not in line:
                    raise CommandError(f"{' '.join(command)}: does not listen: {line!r}")
                # Read on, or the pipe fills up and kubectl stops.
                threading.Thread(target=process.stdout.read, daemon=True).start()
                yield line
            finally:
                process.terminate()

    def diagnosis(self, namespace: str) -> str:
        """What one would look at first when a case fails."""
        looks = [
            ("-n", namespace, "get", "llmd,pods,services", "-o", "wide"),
            ("-n", namespace, "get", "llmd", "-o", "yaml"),
            ("-n", namespace, "get", "events", "--sort-by=.lastTimestamp"),
            ("-n", namespace, "logs", "-l", "app.kubernetes.io/part-of=wherry", "--prefix", "--tail=30"),
            ("logs", "-n", "wherry-system", "-l", "app.kubernetes.io/name=wherry-operator", "--tail=60"),
        ]
        parts = []
        for look in looks:
            try:
                parts.append(f"$ kubectl {' '.join(look)}\n{self.kubectl(*look)}")
            except CommandError as error:
                parts.append(f"$ kubectl {' '.join(look)}\n{error}")
        return "\n".join(parts)


def answers(address: str, port: int) -> bool:
    """Whether a connection is taken up there."""
    try:
        socket.create_connection((address, port), 2).close()
    except OSError:
        return False
    return True


def example(**spec: Any) -> dict[str, Any]:
    """examples/llmdeployment.yaml, with a short drain and `spec` over its own."""
    manifest: dict[str, Any] = yaml.safe_load((ROOT / "examples" / "llmdeployment.yaml").read_text())
    manifest["spec"] |= {"rolloutStrategy": {"drainTimeout": "20s"}} | spec
    return manifest


def is_ready(pod: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
