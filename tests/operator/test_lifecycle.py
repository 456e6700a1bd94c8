"""An LLMDeployment's life against a real API server: made, changed, scaled, restarted around, deleted."""

import base64
import subprocess
from collections.abc import Callable
from typing import Any

from tests.operator.conftest import ROOT
from tests.operator.control_plane import ControlPlane, require_binary
from tests.operator.harness import Kube, Kubelet, OperatorProcess, audit, eventually, running

CHILDREN = ("pods", "deployments", "services", "secrets", "serviceaccounts", "roles", "rolebindings")


def kubectl(plane: ControlPlane, kube: Kube, *args: str) -> subprocess.CompletedProcess[str]:
    command = [require_binary("kubectl"), f"--kubeconfig={plane.kubeconfig()}", f"--namespace={kube.namespace}", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def identities(kube: Kube) -> dict[str, tuple[str, str]]:
    return {
        f"{plural}/{o['metadata']['name']}": (o["metadata"]["uid"], o["metadata"]["resourceVersion"])
        for plural in CHILDREN
        for o in kube.items(plural)
        if o["metadata"]["name"] != "wherry-operator"
    }


def test_examples_become_ready_and_go_away(
    plane: ControlPlane, kube: Kube, operator: OperatorProcess, kubelet: Kubelet
) -> None:
    for path in sorted((ROOT / "examples").glob("*.yaml")):
        applied = kubectl(plane, kube, "apply", "-f", str(path))
        assert applied.returncode == 0, applied.stderr
    names = [d["metadata"]["name"] for d in kube.items("llmdeployments")]
    assert len(names) >= 3
    for name in names:
        kube.wait_ready(name)
    listed = kubectl(plane, kube, "get", "llmd", "-o", "wide").stdout
    assert listed.split()[:9] == ["NAME", "PHASE", "READY", "DESIRED", "UP-TO-DATE", "MODEL", "URL", "AGE", "REASON"]
    assert f"http://chat.{kube.namespace}.svc:8000" in listed
    assert "AllReplicasReady" in listed
    assert "chat" in kubectl(plane, kube, "get", "all").stdout
    for name in names:
        kube.delete("llmdeployments", name)
    eventually(lambda: not kube.items("llmdeployments"), "the LLMDeployments are gone")
    assert identities(kube) == {}


def test_explain_reads_well(plane: ControlPlane, kube: Kube) -> None:
    def explained() -> str:
        return kubectl(plane, kube, "explain", "llmdeployment.spec.scaling").stdout

    eventually(lambda: "Replicas that run at most." in explained(), "the description is served")
    assert "Lets the number of replicas follow the load." in explained()
    assert "<no description>" not in kubectl(plane, kube, "explain", "llmdeployment.spec", "--recursive").stdout


def test_scale_subresource(plane: ControlPlane, kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    kube.deployment(replicas=1)
    kube.deployment("auto", scaling={"maxReplicas": 3})
    kube.wait_ready()
    assert kubectl(plane, kube, "scale", "llmd/chat", "--replicas=3").returncode == 0
    eventually(lambda: len(kube.runtime_pods()) == 3, "three pods run")
    assert kube.wait_ready()["status"]["readyReplicas"] == 3
    scale = kube.call("GET", kube.path("llmdeployments", "chat", "scale"))
    assert scale["status"]["selector"] == ("inference.wherry.dev/deployment=chat,app.kubernetes.io/component=runtime")
    refused = kubectl(plane, kube, "scale", "llmd/auto", "--replicas=3")
    assert refused.returncode != 0
    assert "replicas and scaling exclude each other" in refused.stderr


def test_rollout_never_drops_below(
    plane: ControlPlane, kube: Kube, operator: OperatorProcess, kubelet: Kubelet
) -> None:
    kube.deployment(replicas=3)
    kube.wait_ready()
    first = {pod["metadata"]["name"] for pod in kube.runtime_pods()}
    kube.patch("llmdeployments", "chat", {"spec": {"image": "example.com/runtime:2"}})
    fewest = [3]

    def done() -> bool:
        pods = kube.runtime_pods()
        fewest[0] = min(fewest[0], sum(_ready(pod) for pod in pods))
        return not first & {pod["metadata"]["name"] for pod in pods}

    eventually(done, "every pod is exchanged")
    kube.wait_ready()
    assert fewest[0] == 3
    creations = [entry for entry in audit(plane, kube.namespace) if entry["verb"] == "create"]
    assert len(creations) == 6


def test_rollout_that_cannot_surge_says_so_and_a_revert_costs_nothing(
    kube: Kube, operator: OperatorProcess, kubelet: Kubelet
) -> None:
    ready = kubelet.behaviour
    kube.deployment(replicas=2)
    before = {pod["metadata"]["uid"] for pod in kube.wait_ready() and kube.runtime_pods()}
    message = "0/1 nodes are available: 1 Insufficient memory."
    condition = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": message}
    kubelet.behaviour = lambda pod: {"phase": "Pending", "conditions": [condition]}
    kube.patch("llmdeployments", "chat", {"spec": {"image": "example.com/runtime:2"}})
    found = eventually(
        lambda: (c := kube.condition("InsufficientCapacity")).get("status") == "True" and c, "it says that room lacks"
    )
    assert found["reason"] == "SurgeUnschedulable"
    assert message in found["message"]
    assert "maxUnavailable" in found["message"]
    assert kube.condition("Available")["status"] == "True"
    waits = kube.get("llmdeployments", "chat")["status"]["plan"]
    assert {entry["action"] for entry in waits} == {"DeletePod", "CreatePod"}
    kubelet.behaviour = ready
    kube.patch("llmdeployments", "chat", {"spec": {"image": None}})
    kube.wait_ready()
    assert {pod["metadata"]["uid"] for pod in kube.runtime_pods()} == before


def test_restart_of_the_operator_disturbs_nothing(
    kube: Kube, kubelet: Kubelet, start_operator: Callable[..., OperatorProcess]
) -> None:
    first = start_operator()
    kube.deployment(replicas=2)
    kube.wait_ready()
    before = identities(kube), kube.get("llmdeployments", "chat")["metadata"]["resourceVersion"]
    assert first.stop() == 0
    second = start_operator("operator-b")
    eventually(lambda: "leading as" in second.text(), "the second leads")
    kube.deployment("other", replicas=1)  # what comes after the first look at everything
    kube.wait_ready("other")
    after = {key: value for key, value in identities(kube).items() if "other" not in key}
    assert (after, kube.get("llmdeployments", "chat")["metadata"]["resourceVersion"]) == before


def test_drift_is_mended(kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    kube.deployment(replicas=1)
    kube.wait_ready()
    kube.patch("deployments", "chat-router", {"spec": {"replicas": 5}})
    eventually(lambda: kube.get("deployments", "chat-router")["spec"]["replicas"] == 1, "the router's replicas")
    kube.delete("services", "chat")
    eventually(lambda: kube.get("services", "chat"), "the Service is back")
    kube.delete("deployments", "chat-router")
    eventually(lambda: kube.get("deployments", "chat-router"), "the Deployment is back")


def test_a_failed_pod_is_replaced_with_backoff(kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    kube.deployment(replicas=1)
    kube.wait_ready()
    [pod] = kube.runtime_pods()
    kubelet.behaviour = lambda pod: running("127.9.9.9") | {"phase": "Failed", "reason": "Evicted", "message": "disk"}
    kubelet.set_status(pod, {"phase": "Failed", "reason": "Evicted", "message": "the node was low on disk"})

    def held() -> dict[str, Any] | None:
        plan = kube.get("llmdeployments", "chat")["status"].get("plan", [])
        return next((entry for entry in plan if "times in a row" in entry["reason"]), None)

    assert "failed 2 times in a row" in eventually(held, "the second replacement waits")["reason"]
    [replacement] = kube.runtime_pods()
    assert replacement["metadata"]["annotations"]["inference.wherry.dev/failures"] == "1"
    degraded = kube.condition("Degraded")
    assert (degraded["status"], degraded["reason"]) == ("True", "Evicted")


def test_pods_finish_before_the_router_goes(kube: Kube, start_operator: Callable[..., OperatorProcess]) -> None:
    start_operator()
    with Kubelet(kube):
        kube.deployment(replicas=2)
        kube.wait_ready()
    # Nobody ends the pods now, as if they were still answering.
    kube.delete("llmdeployments", "chat")
    eventually(lambda: not kube.runtime_pods(), "every pod is told to end")
    waits = eventually(
        lambda: kube.get("llmdeployments", "chat")["status"].get("plan"), "the status says what it waits for"
    )
    assert [entry["action"] for entry in waits] == ["Wait", "Wait"]
    assert kube.get("llmdeployments", "chat")["status"]["phase"] == "Terminating"
    assert kube.get("deployments", "chat-router")
    assert kube.get("services", "chat")
    with Kubelet(kube):
        eventually(lambda: not kube.items("llmdeployments"), "it is gone")
    assert identities(kube) == {}


def test_events_name_what_was_done(kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    kube.deployment(replicas=1)
    kube.wait_ready()
    events = eventually(lambda: [e for e in kube.items("events") if e["reason"] == "CreatedPod"], "the event is posted")
    assert "1 replica is wanted" in events[0]["message"]
    assert events[0]["involvedObject"]["name"] == "chat"


def test_the_token_stays_secret(kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    kube.deployment(replicas=1)
    kube.wait_ready()
    token = base64.b64decode(kube.get("secrets", "chat-worker-token")["data"]["token"]).decode()
    assert len(token) >= 43
    for place in (operator.text(), *(str(kube.items(kind)) for kind in ("events", "llmdeployments", "pods"))):
        assert token not in place


def _ready(pod: dict[str, Any]) -> bool:
    return any(c["type"] == "Ready" and c["status"] == "True" for c in pod["status"].get("conditions", []))
