"""What the integration tests hold in their hands: an API client, the operator as a process, and a played kubelet."""

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import httpx
import yaml
from tests.operator.control_plane import ControlPlane

DEADLINE_S = 60.0
PATHS = {
    "pods": "api/v1",
    "services": "api/v1",
    "secrets": "api/v1",
    "serviceaccounts": "api/v1",
    "namespaces": "api/v1",
    "events": "api/v1",
    "resourcequotas": "api/v1",
    "deployments": "apis/apps/v1",
    "controllerrevisions": "apis/apps/v1",
    "poddisruptionbudgets": "apis/policy/v1",
    "roles": "apis/rbac.authorization.k8s.io/v1",
    "rolebindings": "apis/rbac.authorization.k8s.io/v1",
    "clusterroles": "apis/rbac.authorization.k8s.io/v1",
    "clusterrolebindings": "apis/rbac.authorization.k8s.io/v1",
    "leases": "apis/coordination.k8s.io/v1",
    "llmdeployments": "apis/inference.wherry.dev/v1alpha1",
    "customresourcedefinitions": "apis/apiextensions.k8s.io/v1",
}
CLUSTER_WIDE = ("namespaces", "clusterroles", "clusterrolebindings", "customresourcedefinitions")
MERGE = {"Content-Type": "application/merge-patch+json"}
STRATEGIC = {"Content-Type": "application/strategic-merge-patch+json"}


def eventually(check: Callable[[], Any], what: str, timeout: float = DEADLINE_S) -> Any:
    """The first true value of `check`; assertion errors and transport errors count as not yet."""
    deadline = time.monotonic() + timeout
    last: object = None
    while True:
        try:
            if result := check():
                return result
            last = result
        except (AssertionError, httpx.HTTPError, KeyError) as error:
            last = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout:.0f} s: {what}; last: {last!r}")
        time.sleep(0.05)


class Kube:
    """A small client as the administrator, in one namespace."""

    def __init__(self, plane: ControlPlane, namespace: str) -> None:
        self.plane, self.namespace = plane, namespace
        self.http = httpx.Client(
            base_url=plane.server, headers={"Authorization": "Bearer admin-token"}, verify=False, timeout=10
        )

    def path(self, plural: str, name: str = "", sub: str = "") -> str:
        scope = "" if plural in CLUSTER_WIDE else f"namespaces/{self.namespace}/"
        return "/".join(part for part in (f"/{PATHS[plural]}/{scope}{plural}", name, sub) if part)

    def call(self, method: str, path: str, **more: Any) -> dict[str, Any]:
        response = self.http.request(method, path, **more)
        assert response.status_code < 400, response.text
        return dict(response.json())

    def items(self, plural: str, selector: str = "") -> list[dict[str, Any]]:
        return list(self.call("GET", self.path(plural), params={"labelSelector": selector})["items"])

    def get(self, plural: str, name: str) -> dict[str, Any]:
        return self.call("GET", self.path(plural, name))

    def create(self, plural: str, body: dict[str, Any]) -> dict[str, Any]:
        return self.call("POST", self.path(plural), json=body)

    def try_create(self, plural: str, body: dict[str, Any]) -> tuple[int, str]:
        response = self.http.post(self.path(plural), json=body, params={"fieldValidation": "Strict"})
        return response.status_code, response.json().get("message", "")

    def patch(self, plural: str, name: str, body: Any, sub: str = "") -> dict[str, Any]:
        return self.call("PATCH", self.path(plural, name, sub), content=json.dumps(body), headers=MERGE)

    def delete(self, plural: str, name: str, **options: Any) -> None:
        self.http.request("DELETE", self.path(plural, name), json=options)

    def deployment(self, name: str = "chat", **spec: Any) -> dict[str, Any]:
        """Creates an LLMDeployment of the sample model."""
        return self.create("llmdeployments", manifest(name, **spec))

    def runtime_pods(self, name: str = "chat") -> list[dict[str, Any]]:
        chosen = f"inference.wherry.dev/deployment={name},app.kubernetes.io/component=runtime"
        return [pod for pod in self.items("pods", chosen) if "deletionTimestamp" not in pod["metadata"]]

    def condition(self, kind: str, name: str = "chat") -> dict[str, Any]:
        return condition_of(self.get("llmdeployments", name), kind)

    def wait_ready(self, name: str = "chat", timeout: float = DEADLINE_S) -> dict[str, Any]:
        def ready() -> dict[str, Any] | None:
            raw = self.get("llmdeployments", name)
            generation = raw["metadata"]["generation"]
            condition = condition_of(raw, "Ready")
            settled = condition.get("status") == "True" and condition["observedGeneration"] == generation
            return raw if settled else None

        return dict(eventually(ready, f"{name} is Ready", timeout))


def condition_of(raw: dict[str, Any], kind: str) -> dict[str, Any]:
    """One condition of an object; empty where it has none of that type."""
    return next((dict(c) for c in raw.get("status", {}).get("conditions", []) if c["type"] == kind), {})


def manifest(name: str = "chat", **spec: Any) -> dict[str, Any]:
    base = {"model": {"name": "tiny", "uri": "sample://tiny"}}
    return {
        "apiVersion": "inference.wherry.dev/v1alpha1",
        "kind": "LLMDeployment",
        "metadata": {"name": name},
        "spec": base | spec,
    }


class OperatorProcess:
    """`wherry-operator`, serving one namespace as one user."""

    def __init__(self, plane: ControlPlane, namespace: str, user: str = "operator-a", *more: str) -> None:
        self.log = plane.folder / f"{namespace}-{user}.log"
        self._command = [
            *(sys.executable, "-m", "wherry_operator", "--health-port=0", "--health-host=127.0.0.1"),
            *(f"--namespace={namespace}", f"--leader-election-namespace={namespace}"),
            f"--kubeconfig={plane.kubeconfig(user)}",
            *more,
        ]
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "OperatorProcess":
        with self.log.open("ab") as log:
            environment = {k: v for k, v in os.environ.items() if k != "KUBECONFIG"}
            self._process = subprocess.Popen(self._command, stdout=log, stderr=log, env=environment)
        return self

    def signal(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def kill(self) -> None:
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self._process.kill()
            self._process.wait(timeout=20)
            self._process = None

    def stop(self) -> int:
        """SIGTERM; the exit status."""
        assert self._process is not None
        self._process.terminate()
        status = self._process.wait(timeout=20)
        self._process = None
        return status

    def text(self) -> str:
        return self.log.read_text() if self.log.exists() else ""


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def running(ip: str, ready: bool = True) -> dict[str, Any]:
    """A pod's status while its container runs. `Ready` waits for the pod's readiness gates: see Kubelet."""
    state = {"running": {"startedAt": now()}}
    return {
        "phase": "Running",
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "conditions": [
            {"type": "PodScheduled", "status": "True"},
            {"type": "ContainersReady", "status": str(ready), "lastTransitionTime": now()},
            {"type": "Ready", "status": str(ready), "lastTransitionTime": now()},
        ],
        "containerStatuses": [container(state, ready)],
    }


def container(state: dict[str, Any], ready: bool = False, restarts: int = 0, **more: Any) -> dict[str, Any]:
    base = {"name": "runtime", "image": "x", "imageID": "x", "ready": ready, "restartCount": restarts, "state": state}
    return base | more


def waiting(reason: str, message: str = "", **more: Any) -> dict[str, Any]:
    """A pod's status while its container cannot run."""
    state = {"waiting": {"reason": reason, "message": message}}
    conditions = [{"type": "PodScheduled", "status": "True"}, {"type": "Ready", "status": "False"}]
    return {"phase": "Pending", "conditions": conditions, "containerStatuses": [container(state, **more)]}


def unschedulable(message: str) -> dict[str, Any]:
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    return {"phase": "Pending", "conditions": [condition]}


Behaviour = Callable[[dict[str, Any]], dict[str, Any] | None]


class Kubelet:
    """Plays scheduler, kubelet and deployment controller in one namespace, in a thread.

    `behaviour` gives the status of a pod that has none yet; None leaves it as it is.
    """

    def __init__(self, kube: Kube, behaviour: Behaviour | None = None) -> None:
        self._kube = Kube(kube.plane, kube.namespace)
        self._ips = (f"127.9.{i // 250}.{i % 250 + 1}" for i in itertools.count())
        self.node = "n1"  # where it binds pods to
        self.behaviour: Behaviour = behaviour or (lambda pod: running(next(self._ips)))
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> "Kubelet":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(timeout=20)
        self._kube.http.close()

    def _run(self) -> None:
        while not self._stop.wait(0.05):
            with contextlib.suppress(AssertionError, httpx.HTTPError):
                self._pass()

    def _pass(self) -> None:
        for pod in self._kube.items("pods"):
            name = pod["metadata"]["name"]
            if "deletionTimestamp" in pod["metadata"]:
                self._kube.delete("pods", name, gracePeriodSeconds=0)
            elif not pod["status"].get("conditions") and (status := self.behaviour(pod)):
                if status.get("containerStatuses"):
                    target = {"apiVersion": "v1", "kind": "Node", "name": self.node}
                    binding = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": name}, "target": target}
                    self._kube.http.post(self._kube.path("pods", name, "binding"), json=binding)
                self.set_status(pod, status)
            else:
                self._mind_gates(pod)
        for deployment in self._kube.items("deployments"):
            wanted, status = deployment["spec"]["replicas"], deployment.get("status", {})
            if status.get("readyReplicas", 0) != wanted:
                body = {"status": {"replicas": wanted, "readyReplicas": wanted, "availableReplicas": wanted}}
                self._kube.patch("deployments", deployment["metadata"]["name"], body, "status")

    def _mind_gates(self, pod: dict[str, Any]) -> None:
        conditions = condition_states(pod)
        if conditions.get("ContainersReady") == "True" != conditions.get("Ready") and _gates_open(pod):
            ready = {"type": "Ready", "status": "True", "lastTransitionTime": now()}
            self.set_status(pod, {"conditions": [ready]})

    def set_status(self, pod: dict[str, Any], status: dict[str, Any]) -> None:
        """Writes a pod's status as a kubelet does: conditions merge, and a shut readiness gate keeps it from Ready."""
        told = [
            c | {"status": "False"} if c["type"] == "Ready" and not _gates_open(pod) else c
            for c in status.get("conditions", [])
        ]
        body = {"status": status | ({"conditions": told} if told else {})}
        path = self._kube.path("pods", pod["metadata"]["name"], "status")
        self._kube.call("PATCH", path, content=json.dumps(body), headers=STRATEGIC)


def condition_states(pod: dict[str, Any]) -> dict[str, str]:
    """The status of each of an object's conditions, by type."""
    return {c["type"]: c["status"] for c in pod.get("status", {}).get("conditions", [])}


def _gates_open(pod: dict[str, Any]) -> bool:
    conditions = condition_states(pod)
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates", [])]
    return all(conditions.get(gate) == "True" for gate in gates)


def audit(plane: ControlPlane, namespace: str, plural: str = "pods") -> Iterator[dict[str, Any]]:
    """Writes to one kind of object in a namespace that the API server took, in order: user, verb, time and name."""
    for line in plane.audit_log.read_text().splitlines():
        entry = json.loads(line)
        target = entry.get("objectRef", {})
        same = (target.get("resource"), target.get("namespace"), target.get("subresource")) == (plural, namespace, None)
        if same and entry["responseStatus"]["code"] < 300:
            when = datetime.fromisoformat(entry["requestReceivedTimestamp"])
            yield {"user": entry["user"]["username"], "verb": entry["verb"], "at": when, "name": target.get("name")}


def grant(kube: Kube, users: tuple[str, ...] = ("operator-a", "operator-b")) -> None:
    """Gives the operators the rights of a namespaced install, and nothing more."""
    rules = yaml.safe_load((Path(__file__).parent / "rbac.yaml").read_text())["rules"]
    kube.create("roles", {"metadata": {"name": "wherry-operator"}, "rules": rules})
    subjects = [{"kind": "User", "name": user, "apiGroup": "rbac.authorization.k8s.io"} for user in users]
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": "wherry-operator"}
    kube.create("rolebindings", {"metadata": {"name": "wherry-operator"}, "roleRef": reference, "subjects": subjects})
