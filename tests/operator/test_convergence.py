"""Whatever happens, the cluster ends as the spec says: random edits, scalings and kills, checked against a model."""

import itertools
import os
import random
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any

from tests.operator.control_plane import ControlPlane
from tests.operator.harness import Kube, Kubelet, OperatorProcess, audit, eventually

SEED = 20260101
OPERATIONS = 30
# How long the API server stays away. Shorten it while working on this; the whole suite runs the full time.
OUTAGE_S = float(os.environ.get("WHERRY_TEST_OUTAGE_S", "30"))


@dataclass
class Model:
    """What should be there, kept by the test alone."""

    replicas: int = 2
    image: str = "example.com/runtime:0"
    router_replicas: int = 1
    drain: str = "5m"
    history: list[str] = field(default_factory=list)

    def spec(self) -> dict[str, Any]:
        return {
            "replicas": self.replicas,
            "image": self.image,
            "router": {"replicas": self.router_replicas},
            "rolloutStrategy": {"drainTimeout": self.drain},
        }

    def check(self, kube: Kube) -> bool:
        raw = kube.get("llmdeployments", "chat")
        status, generation = raw["status"], raw["metadata"]["generation"]
        pods = kube.runtime_pods()
        assert len(pods) == self.replicas, f"{len(pods)} pods"
        grace = int(self.drain.removesuffix("m")) * 60 + 10
        for pod in pods:
            assert pod["spec"]["containers"][0]["image"] == self.image
            assert pod["spec"]["terminationGracePeriodSeconds"] == grace
            assert pod["metadata"]["labels"]["inference.wherry.dev/revision"] == status["revision"]
        assert kube.get("deployments", "chat-router")["spec"]["replicas"] == self.router_replicas
        assert kube.get("services", "chat")
        assert (status["replicas"], status["observedGeneration"]) == (self.replicas, generation)
        assert status["readyReplicas"] == status["updatedReplicas"] == self.replicas
        assert not status.get("plan"), status["plan"]
        assert kube.condition("Ready")["status"] == ("True" if self.replicas else "False")
        assert kube.condition("Degraded")["status"] == "False"
        return True


class World:
    """The operations that a random generator picks from; each changes the cluster, and the model where it should."""

    def __init__(self, kube: Kube, kubelet: Kubelet, rng: random.Random) -> None:
        self.kube, self.kubelet, self.rng, self.model = kube, kubelet, rng, Model()
        self.operations: list[Callable[[], None]] = [
            *[self.scale] * 3,
            *[self.edit] * 3,
            self.edit_drain,
            *[self.kill_pods] * 2,
            self.fail_pod,
            self.router,
            self.vandalise,
            self.edit_twice,
        ]

    def step(self) -> str:
        operation = self.rng.choice(self.operations)
        operation()
        return operation.__name__

    def _patch(self) -> None:
        self.kube.patch("llmdeployments", "chat", {"spec": self.model.spec()})

    def scale(self) -> None:
        self.model.replicas = self.rng.randint(0, 5)
        self.kube.patch("llmdeployments", "chat", {"spec": {"replicas": self.model.replicas}}, "scale")

    def edit(self) -> None:
        self.model.image = f"example.com/runtime:{self.rng.randint(0, 3)}"
        self._patch()

    def edit_drain(self) -> None:
        self.model.drain = f"{self.rng.randint(1, 9)}m"
        self._patch()

    def edit_twice(self) -> None:
        self.edit()
        self.scale()
        self.edit()

    def router(self) -> None:
        self.model.router_replicas = self.rng.randint(1, 3)
        self._patch()

    def kill_pods(self) -> None:
        pods = self.kube.runtime_pods()
        for pod in self.rng.sample(pods, min(len(pods), self.rng.randint(1, 3))):
            self.kube.delete("pods", pod["metadata"]["name"], gracePeriodSeconds=0)

    def fail_pod(self) -> None:
        for pod in self.rng.sample(self.kube.runtime_pods(), min(1, len(self.kube.runtime_pods()))):
            self.kubelet.set_status(
                pod, {"phase": "Failed", "reason": "Evicted", "message": "the node was low on disk"}
            )

    def vandalise(self) -> None:
        kind, name = self.rng.choice([("deployments", "chat-router"), ("services", "chat"), ("pods", "")])
        if name:
            self.kube.delete(kind, name)


def test_random_operations_converge_each_time(kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    world = World(kube, kubelet, random.Random(SEED))
    kube.deployment(**world.model.spec())
    eventually(lambda: world.model.check(kube), "it begins well")
    for number in range(OPERATIONS):
        world.model.history.append(world.step())
        eventually(lambda: world.model.check(kube), f"operation {number}: {world.model.history[-5:]}")


def test_an_operator_killed_at_any_moment_converges(
    plane: ControlPlane, kube: Kube, kubelet: Kubelet, start_operator: Callable[..., OperatorProcess]
) -> None:
    """Killed with -9 again and again while the operations go on; its successor finds what it left half done."""
    rng = random.Random(SEED)
    world = World(kube, kubelet, rng)
    operator = start_operator("operator-a", "--no-leader-election")
    kube.deployment(**world.model.spec())
    done = threading.Event()

    def killer() -> None:
        moments = random.Random(SEED + 1)
        for _ in range(8):
            eventually(lambda: "serving" in operator.text(), "the operator is up")
            # From before its first request to well into its work; it needs about a second to start.
            done.wait(moments.uniform(0.8, 3.0))
            operator.kill()
            operator.start()
        done.set()

    thread = threading.Thread(target=killer)
    thread.start()
    while not done.is_set():
        world.model.history.append(world.step())
        done.wait(0.4)
    thread.join()
    eventually(lambda: world.model.check(kube), f"it converges after {world.model.history}")
    eventually(
        lambda: len(kube.items("pods", "app.kubernetes.io/component=runtime")) == world.model.replicas, "no more pods"
    )


def test_thirty_seconds_without_the_api_server_change_nothing(
    plane: ControlPlane, kube: Kube, operator: OperatorProcess, kubelet: Kubelet
) -> None:
    kube.deployment(replicas=2)
    kube.wait_ready()

    def identities() -> list[tuple[str, str]]:
        return sorted((p["metadata"]["uid"], p["metadata"]["resourceVersion"]) for p in kube.runtime_pods())

    before = identities()
    writes = len(list(audit(plane, kube.namespace)))
    plane.kill("kube-apiserver")
    threading.Event().wait(OUTAGE_S)
    plane.start_apiserver()
    kube.patch("llmdeployments", "chat", {"spec": {"router": {"replicas": 2}}})
    eventually(
        lambda: kube.get("deployments", "chat-router")["spec"]["replicas"] == 2, "the operator acts again", timeout=60
    )
    assert identities() == before
    assert len(list(audit(plane, kube.namespace))) == writes, "pods were written"
    kube.patch("llmdeployments", "chat", {"spec": {"replicas": 3}})
    assert kube.wait_ready()["status"]["readyReplicas"] == 3
    assert {uid for uid, _ in before} < {uid for uid, _ in identities()}


def test_two_operators_never_fight(
    plane: ControlPlane, kube: Kube, kubelet: Kubelet, start_operator: Callable[..., OperatorProcess]
) -> None:
    """One acts. It is frozen until the other has taken over; thawed, it must not write a thing."""
    world = World(kube, kubelet, random.Random(SEED + 2))
    operators = {user: start_operator(user) for user in ("operator-a", "operator-b")}
    kube.deployment(**world.model.spec())
    eventually(lambda: world.model.check(kube), "one of them acts")
    for _ in range(6):
        world.step()
        eventually(lambda: world.model.check(kube), "it goes on")
    [leader] = {entry["user"] for entry in writes(plane, kube)}
    [other] = set(operators) - {leader}
    operators[leader].signal(signal.SIGSTOP)
    world.scale()
    eventually(lambda: world.model.check(kube), "the other takes over", timeout=60)
    handover = max(entry["at"] for entry in writes(plane, kube) if entry["user"] == other)
    operators[leader].signal(signal.SIGCONT)
    eventually(lambda: "standing by" in operators[leader].text(), "the thawed one stands by")
    for _ in range(6):
        world.step()
        eventually(lambda: world.model.check(kube), "the other goes on")
    assert {entry["user"] for entry in writes(plane, kube, handover)} == {other}
    users = [entry["user"] for entry in writes(plane, kube)]
    assert sum(a != b for a, b in itertools.pairwise(users)) == 1, "they took turns"


def writes(plane: ControlPlane, kube: Kube, since: datetime | None = None) -> list[dict[str, Any]]:
    """What the operators wrote to pods, routers and the status, in order."""
    entries = [e for plural in ("pods", "deployments", "llmdeployments") for e in audit(plane, kube.namespace, plural)]
    ours = [e for e in entries if e["user"].startswith("operator-")]
    ours.sort(key=lambda e: e["at"])
    return [e for e in ours if since is None or e["at"] > since + timedelta(milliseconds=1)]
