"""What the planner looks at in a pod. Pure: raw objects in, small views out."""

from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from wherry_operator.desired.common import ANNOTATION_FAILURES
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


@dataclass(frozen=True)
class PodView:
    """One runtime pod. Times are UTC; `created` is what the API server wrote."""

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

    @property
    def lost(self) -> bool:
        """Whether the kubelet will not bring it back: it ended, or its node is gone."""
        return self.phase in TERMINAL_PHASES or self.reason in LOST_REASONS

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
        failures = annotations.get(ANNOTATION_FAILURES, "0")
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
            failures=int(failures) if failures.isdigit() else 0,
            # The kubelet sets Ready=False before the container starts, so a later change means that it was True once.
            was_ready=bool(changed and container.started and changed > container.started),
            finished=max(created, _finished(status, conditions) or created),
            container=container,
        )


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
    )


def _finished(status: dict[str, Any], conditions: dict[str, Any]) -> datetime | None:
    ended = [
        moment
        for state in status.get("containerStatuses", [])
        if (moment := parse_time(state.get("state", {}).get("terminated", {}).get("finishedAt")))
    ]
    return max(ended) if ended else parse_time(conditions.get("Ready", {}).get("lastTransitionTime"))
