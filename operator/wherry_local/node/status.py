"""A pod's status from the states of its containers. Pure: the same input gives the same status."""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Object = dict[str, Any]


def timestamp() -> str:
    """Now, as Kubernetes writes times."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def whole_seconds(text: str) -> str:
    """A time with fractions, as Kubernetes writes it in a status."""
    return text.partition(".")[0].rstrip("Z") + "Z" if text else timestamp()


def waiting(reason: str, message: str = "") -> Object:
    """The state of a container that does not run yet, or not at the moment."""
    return {"waiting": {"reason": reason} | ({"message": message} if message else {})}


@dataclass
class ContainerStatus:
    """What is known of one container."""

    name: str
    image: str
    state: Object = field(default_factory=lambda: waiting("ContainerCreating"))
    last_state: Object = field(default_factory=dict)
    restarts: int = 0
    started: bool = False
    ready: bool = False
    container_id: str = ""
    sidecar: bool = False

    def to_json(self) -> Object:
        """An entry of `containerStatuses`."""
        return {
            "name": self.name,
            "image": self.image,
            "imageID": "",
            "containerID": self.container_id,
            "ready": self.ready,
            "started": self.started,
            "restartCount": self.restarts,
            "state": self.state,
            "lastState": self.last_state,
        }

    @property
    def exit_code(self) -> int | None:
        """The exit code of a container that has ended for good."""
        ended = self.state.get("terminated")
        return None if ended is None else int(ended["exitCode"])


def phase(policy: str, init: Sequence[ContainerStatus], main: Sequence[ContainerStatus]) -> str:
    """The pod's phase, by the kubelet's rules."""
    if any(status.exit_code not in (None, 0) for status in init if not status.sidecar) and policy == "Never":
        return "Failed"
    if not initialized(init):
        return "Pending"
    codes = [status.exit_code for status in main]
    if all(code is not None for code in codes) and policy != "Always":
        if all(code == 0 for code in codes):
            return "Succeeded"
        if policy == "Never":
            return "Failed"
    begun = all("waiting" not in status.state or status.last_state for status in main)
    return "Running" if begun else "Pending"


def initialized(init: Sequence[ContainerStatus]) -> bool:
    """True when every init container has done its work."""
    return all(status.started if status.sidecar else status.exit_code == 0 for status in init)


def _condition(kind: str, value: bool, reason: str = "", message: str = "", generation: int = 0) -> Object:
    entry: Object = {"type": kind, "status": "True" if value else "False", "reason": reason, "message": message}
    return entry | ({"observedGeneration": generation} if generation else {})


def conditions(
    pod: Object, current: str, init: Sequence[ContainerStatus], main: Sequence[ContainerStatus]
) -> list[Object]:
    """The kubelet's conditions; a readiness gate must hold for Ready, as the pod's own conditions say it."""
    generation = int(pod["metadata"].get("generation") or 0)
    done = "PodCompleted" if current == "Succeeded" else "PodFailed" if current == "Failed" else ""
    pending = [status.name for status in init if not (status.started if status.sidecar else status.exit_code == 0)]
    unready = [status.name for status in main if not status.ready]
    others = {c["type"]: c["status"] for c in pod.get("status", {}).get("conditions") or []}
    gates = [gate["conditionType"] for gate in pod["spec"].get("readinessGates") or []]
    shut = [gate for gate in gates if others.get(gate) != "True"]
    init_reason = "" if not pending else "ContainersNotInitialized"
    init_message = f"containers with incomplete status: [{' '.join(pending)}]" if pending else ""
    reason = done or ("ContainersNotReady" if unready else "")
    message = f"containers with unready status: [{' '.join(unready)}]" if unready and not done else ""
    ready_reason, ready_message = reason, message
    if not unready and shut:
        ready_reason, ready_message = (
            "ReadinessGatesNotReady",
            f"corresponding conditions of pod readiness gates {shut} are not True",
        )
    began = any("running" in status.state or status.last_state for status in [*init, *main])
    return [
        _condition("PodReadyToStartContainers", began and not done, generation=generation),
        _condition("Initialized", not pending, done if not pending else init_reason, init_message, generation),
        _condition("Ready", not unready and not shut and not done, ready_reason, ready_message, generation),
        _condition("ContainersReady", not unready and not done, reason, message, generation),
        _condition("PodScheduled", True, generation=generation),
    ]


def with_transition_times(new: list[Object], old: Sequence[Mapping[str, Any]]) -> list[Object]:
    """`new` with each lastTransitionTime kept where the status did not change."""
    before = {condition["type"]: condition for condition in old}
    now = timestamp()
    for condition in new:
        same = before.get(condition["type"])
        kept = same is not None and same["status"] == condition["status"]
        condition["lastTransitionTime"] = same["lastTransitionTime"] if same is not None and kept else now
    return new


def _qos(spec: Object) -> str:
    requirements = [container.get("resources") or {} for container in spec["containers"]]
    if not any(item.get("requests") or item.get("limits") for item in requirements):
        return "BestEffort"
    for item in requirements:
        limits, requests = item.get("limits") or {}, item.get("requests") or {}
        if any(key not in limits or requests.get(key, limits[key]) != limits[key] for key in ("cpu", "memory")):
            return "Burstable"
    return "Guaranteed"


def pod_status(
    pod: Object, init: Sequence[ContainerStatus], main: Sequence[ContainerStatus], facts: Mapping[str, str]
) -> Object:
    """The whole status; `facts` holds pod_ip, host_ip and start_time."""
    current = phase(pod["spec"].get("restartPolicy", "Always"), init, main)
    old = pod.get("status", {}).get("conditions") or []
    status: Object = {
        "phase": current,
        "observedGeneration": int(pod["metadata"].get("generation") or 0),
        "conditions": with_transition_times(conditions(pod, current, init, main), old),
        "hostIP": facts["host_ip"],
        "hostIPs": [{"ip": facts["host_ip"]}],
        "podIP": facts["pod_ip"],
        "podIPs": [{"ip": facts["pod_ip"]}],
        "startTime": facts["start_time"],
        "qosClass": _qos(pod["spec"]),
        "containerStatuses": [container.to_json() for container in main],
    }
    if init:
        status["initContainerStatuses"] = [container.to_json() for container in init]
    return status
