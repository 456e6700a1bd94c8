"""What the planner looks at in a pod. Pure: raw objects in, small views out."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import msgspec

from wherry_operator.desired.common import ANNOTATION_AVOID, ANNOTATION_CAUSE, ANNOTATION_FAILURES
from wherry_operator.desired.runtime import CONTAINER
from wherry_protocol import naming

TERMINAL_PHASES = ("Failed", "Succeeded")
# Set by the node controllers on pods whose node is gone.
LOST_REASONS = ("NodeLost", "NodeShutdown", "Terminated")


def parse_time(text: str | None) -> datetime | None:
    """A Kubernetes timestamp, or None."""
    return datetime.fromisoformat(text) if text else None


@dataclass(frozen=True)
class ContainerState:
    """The first container of a pod that is not well, or its engine."""

    name: str = ""
    restarts: int = 0
    waiting_reason: str = ""
    waiting_message: str = ""
    exit_code: int | None = None
    exit_reason: str = ""
    exit_message: str = ""
    started: datetime | None = None
    # The run that ended last: when, and how many seconds it took.
    exited: datetime | None = None
    ran_s: float = 0.0


class Quality(msgspec.Struct, frozen=True):
    """`quality` of `GET /health`; see wherry_runtime/server/drift.py."""

    method: str
    divergence: float | None = None
    change: float | None = None
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class PodView:
    """One runtime pod. Times are UTC; `created` is what the API server wrote.

    `containers_ready`: since when every container is ready; None while one is not. `gated`: it has the readiness gate
    and nobody has opened it yet. `drain`: by when a pod that is marked to go has to be free; None without a mark.
    `index` is its place in its group, of `group_size` pods; `leader` the address of pod 0 that it was made with.
    `restarts` are those of the engine's container. `failed_before`: what the group before this one died of.
    `avoids`: nodes that it must not be bound to, as they were lost when it was made.
    `tls`: whether it answers by TLS; told by its readiness probe, so it holds for each pod of a rollout. `mutual_tls`:
    whether it is a worker that answers nobody without a certificate, and probes elsewhere; told by its port's name.
    `downloading`: how far its worker is with downloading the model, as it told the last probe.
    `quality`: what rounding cost its model, as its worker told a probe.
    `lost_because`: why the operator holds its node for lost; not the pod's own word, see failover.py.
    """

    name: str
    uid: str
    group: str
    revision: str
    created: datetime
    phase: str = "Pending"
    ready: bool = False
    deleting: bool = False
    ip: str = ""
    node: str = ""
    reason: str = ""
    message: str = ""
    unschedulable: str = ""
    failures: int = 0
    was_ready: bool = False
    finished: datetime | None = None
    container: ContainerState = ContainerState()
    containers_ready: datetime | None = None
    gated: bool = False
    drain: datetime | None = None
    index: int = 0
    group_size: int = 1
    leader: str = ""
    host_ip: str = ""
    restarts: int = 0
    failed_before: str = ""
    avoids: tuple[str, ...] = ()
    lost_because: str = ""
    tls: bool = False
    mutual_tls: bool = False
    downloading: str = ""
    quality: Quality | None = None

    @property
    def ended(self) -> bool:
        """Whether it says of itself that the kubelet will not bring it back."""
        return self.phase in TERMINAL_PHASES or self.reason in LOST_REASONS

    @property
    def lost(self) -> bool:
        """Whether nobody will bring it back: it ended, or its node is gone."""
        return self.ended or bool(self.lost_because)

    @property
    def blames_peer(self) -> bool:
        """Whether its container ended only because another rank of its group did, by its own last words."""
        return naming.EXIT_PEER_LOST in self.container.exit_message

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> "PodView":
        """The view of a pod as the API server sends it."""
        metadata, status = raw["metadata"], raw.get("status", {})
        labels, annotations = metadata.get("labels", {}), metadata.get("annotations", {})
        conditions = {c["type"]: c for c in status.get("conditions", [])}
        ready = conditions.get("Ready", {})
        scheduled = conditions.get("PodScheduled", {})
        container = _worst_container(status)
        created = parse_time(metadata.get("creationTimestamp")) or datetime.fromtimestamp(0, UTC)
        changed = parse_time(ready.get("lastTransitionTime"))
        environment = _environment(raw)
        unschedulable = scheduled.get("status") == "False" and scheduled.get("reason") == "Unschedulable"
        return cls(
            name=metadata["name"],
            uid=metadata["uid"],
            group=labels.get(naming.LABEL_GROUP, ""),
            revision=labels.get(naming.LABEL_REVISION, ""),
            created=created,
            phase=status.get("phase", "Pending"),
            ready=ready.get("status") == "True",
            deleting="deletionTimestamp" in metadata,
            ip=status.get("podIP", ""),
            node=raw.get("spec", {}).get("nodeName", ""),
            reason=status.get("reason", ""),
            message=status.get("message", ""),
            unschedulable=scheduled.get("message", "no node fits") if unschedulable else "",
            failures=_number(annotations.get(ANNOTATION_FAILURES, "")),
            # The kubelet sets Ready=False before the container starts, so a later change means that it was True once.
            was_ready=bool(changed and container.started and changed > container.started),
            finished=max(created, _finished(status, conditions) or created),
            container=container,
            containers_ready=_containers_ready(status, conditions, created),
            gated=_gated(raw, conditions),
            drain=_drain(annotations, created),
            index=_number(labels.get(naming.LABEL_RANK, "")),
            group_size=_number(environment.get(naming.ENV_GROUP_SIZE, "")) or 1,
            leader=environment.get(naming.ENV_LEADER_ADDRESS, ""),
            host_ip=status.get("hostIP", ""),
            restarts=_restarts(status),
            failed_before=annotations.get(ANNOTATION_CAUSE, ""),
            tls=_tls(raw),
            mutual_tls=_mutual_tls(raw),
            avoids=tuple(filter(None, annotations.get(ANNOTATION_AVOID, "").split(","))),
        )


def _tls(raw: dict[str, Any]) -> bool:
    probes = (c.get("readinessProbe", {}) for c in raw.get("spec", {}).get("containers", []))
    return any(probe.get("httpGet", {}).get("scheme") == "HTTPS" for probe in probes)


def _mutual_tls(raw: dict[str, Any]) -> bool:
    return any(port.get("name") == naming.PORT_TLS for port in _engine(raw).get("ports") or [])


def _containers_ready(status: dict[str, Any], conditions: dict[str, Any], created: datetime) -> datetime | None:
    if condition := conditions.get("ContainersReady"):
        since = parse_time(condition.get("lastTransitionTime")) or created
        return since if condition.get("status") == "True" else None
    states = status.get("containerStatuses", [])
    return created if states and all(state.get("ready") for state in states) else None


def _gated(raw: dict[str, Any], conditions: dict[str, Any]) -> bool:
    gates = [gate.get("conditionType") for gate in raw.get("spec", {}).get("readinessGates") or []]
    return naming.GATE_ROUTABLE in gates and conditions.get(naming.GATE_ROUTABLE, {}).get("status") != "True"


def _drain(annotations: dict[str, str], created: datetime) -> datetime | None:
    if (text := annotations.get(naming.ANNOTATION_DRAIN)) is None:
        return None
    try:
        deadline = datetime.fromisoformat(text)
    except ValueError:
        return created  # somebody wrote something else there: a mark all the same, and its time is over
    return deadline if deadline.tzinfo else deadline.replace(tzinfo=UTC)


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0


def _environment(raw: dict[str, Any]) -> dict[str, str]:
    """The engine's variables that have plain values."""
    return {entry["name"]: entry.get("value", "") for entry in _engine(raw).get("env") or []}


def _engine(raw: dict[str, Any]) -> dict[str, Any]:
    containers: list[dict[str, Any]] = raw.get("spec", {}).get("containers", [])
    return next((c for c in containers if c.get("name") == CONTAINER), {})


def _restarts(status: dict[str, Any]) -> int:
    engine = (s for s in status.get("containerStatuses", []) if s.get("name") == CONTAINER)
    return max((state.get("restartCount", 0) for state in engine), default=0)


def _worst_container(status: dict[str, Any]) -> ContainerState:
    states = [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]
    views = [_container(state) for state in states]
    unwell = [view for view in views if view.waiting_reason or view.exit_code]
    engine = [view for view in views if view.name == CONTAINER]
    return (unwell or engine or views or [ContainerState()])[0]


def _container(raw: dict[str, Any]) -> ContainerState:
    state = raw.get("state", {})
    waiting, running = state.get("waiting", {}), state.get("running", {})
    ended = state.get("terminated") or raw.get("lastState", {}).get("terminated") or {}
    exited, began = parse_time(ended.get("finishedAt")), parse_time(ended.get("startedAt"))
    # A container that runs again after a restart is judged by what it does now, unless it keeps on falling.
    return ContainerState(
        name=raw.get("name", ""),
        restarts=raw.get("restartCount", 0),
        waiting_reason=waiting.get("reason", ""),
        waiting_message=waiting.get("message", ""),
        exit_code=ended.get("exitCode"),
        exit_reason=ended.get("reason", ""),
        exit_message=(ended.get("message") or "").strip(),
        started=parse_time(running.get("startedAt")),
        exited=exited,
        ran_s=(exited - began).total_seconds() if exited and began else 0.0,
    )


def _finished(status: dict[str, Any], conditions: dict[str, Any]) -> datetime | None:
    ended = [
        moment
        for state in status.get("containerStatuses", [])
        if (moment := parse_time(state.get("state", {}).get("terminated", {}).get("finishedAt")))
    ]
    return max(ended) if ended else parse_time(conditions.get("Ready", {}).get("lastTransitionTime"))
