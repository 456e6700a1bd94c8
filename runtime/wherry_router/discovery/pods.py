"""From pods to places to send requests to. Pure: reads the pods' JSON, does no I/O.

A group is one worker in one or more pods. Requests go to the pod with rank 0, and only while every pod of the group has
its containers ready: with one missing the leader can compute nothing. `Ready` is not looked at, since it waits for the
`routable` gate, which the operator opens only when a router knows the pod.
"""

from collections.abc import Iterable
from datetime import UTC, datetime
from typing import Any, NamedTuple

from wherry_protocol.naming import (
    ANNOTATION_DRAIN,
    ENV_GROUP_SIZE,
    LABEL_GROUP,
    LABEL_RANK,
    PORT_PLAIN,
    PORT_TLS,
    WORKER_PORT,
)
from wherry_router.pool import Endpoint

CONTAINER = "runtime"  # what the operator calls the engine's


class Pod(NamedTuple):
    """What of a pod decides. `deadline`: Unix time, None where the drain has none."""

    group: str
    rank: str
    size: int
    endpoint: Endpoint | None
    ready: bool
    draining: bool
    deadline: float | None
    secure: bool = False  # it speaks mutual TLS


class Target(NamedTuple):
    """A group's leader, where requests run. `draining`: no new ones; `deadline` (Unix time): when the others move."""

    endpoint: Endpoint
    draining: bool = False
    deadline: float | None = None


def read(pod: dict[str, Any]) -> Pod:
    """A pod's JSON as a `Pod`. Whatever is missing makes it unready, never an error."""
    metadata, status = pod.get("metadata") or {}, pod.get("status") or {}
    labels = metadata.get("labels") or {}
    conditions = {c.get("type"): c.get("status") for c in status.get("conditions") or []}
    mark = (metadata.get("annotations") or {}).get(ANNOTATION_DRAIN)
    over = status.get("phase") in ("Succeeded", "Failed")
    return Pod(
        group=labels.get(LABEL_GROUP) or metadata.get("name") or "",
        rank=labels.get(LABEL_RANK) or "0",
        size=_size(pod),
        endpoint=None if over else _endpoint(pod),
        ready=not over and conditions.get("ContainersReady") == "True",
        draining=mark is not None or bool(metadata.get("deletionTimestamp")),
        deadline=None if mark is None else _unix_time(mark),
        secure=_port(pod)[0] == PORT_TLS,
    )


def targets(pods: Iterable[Pod], *, secure: bool = False) -> list[Target]:
    """Where requests run: each group's leader, if the group is whole and ready, or draining and its leader there.

    With `secure` only pods that speak mutual TLS, else only those that do not: a router speaks in one way.
    """
    groups: dict[str, list[Pod]] = {}
    for pod in pods:
        if pod.secure == secure:
            groups.setdefault(pod.group, []).append(pod)
    found = []
    for members in groups.values():
        draining = any(pod.draining for pod in members)
        deadline = min((pod.deadline for pod in members if pod.deadline is not None), default=None)
        size = max(pod.size for pod in members)
        whole = {pod.rank for pod in members if pod.ready} >= {str(rank) for rank in range(size)}
        if not draining and not (whole and all(pod.ready for pod in members)):
            continue
        leaders = (pod.endpoint for pod in members if pod.rank == "0")
        found += [Target(endpoint, draining, deadline) for endpoint in leaders if endpoint is not None]
    return found


def _endpoint(pod: dict[str, Any]) -> Endpoint | None:
    metadata = pod.get("metadata") or {}
    address = (pod.get("status") or {}).get("podIP")
    if not address:
        return None
    host = f"[{address}]" if ":" in address else address
    scheme, port = _port(pod)
    return Endpoint(name=f"{metadata.get('name')}/{metadata.get('uid')}", url=f"{scheme}://{host}:{port}")


def _containers(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return (pod.get("spec") or {}).get("containers") or []


def _port(pod: dict[str, Any]) -> tuple[str, int]:
    """Name and number of the port that the runtime container calls `https` or `http`; the name is the scheme too."""
    for container in _containers(pod):
        if container.get("name") != CONTAINER:
            continue
        for port in container.get("ports") or []:
            if port.get("name") in (PORT_PLAIN, PORT_TLS):
                return port["name"], int(port["containerPort"])
    return PORT_PLAIN, WORKER_PORT


def _size(pod: dict[str, Any]) -> int:
    """How many pods its group has, as its own environment says; 1 where it says nothing."""
    for container in _containers(pod):
        for variable in container.get("env") or []:
            value = str(variable.get("value") or "")
            if variable.get("name") == ENV_GROUP_SIZE and value.isdecimal():
                return max(int(value), 1)
    return 1


def _unix_time(text: str) -> float | None:
    """RFC 3339 as Unix time. What cannot be read is no deadline: the drain is meant, its end is not known."""
    try:
        when = datetime.fromisoformat(text)
    except ValueError:
        return None
    return (when if when.tzinfo else when.replace(tzinfo=UTC)).timestamp()


class PodSet:
    """The pods that a list and the watch events after it add up to."""

    def __init__(self, *, secure: bool = False) -> None:
        self._pods: dict[str, Pod] = {}
        self.secure = secure
        self.resource_version = ""
        self.targets: list[Target] = []  # where requests run

    def reset(self, listing: dict[str, Any]) -> None:
        """A fresh list replaces everything."""
        self._pods = {pod["metadata"]["name"]: read(pod) for pod in listing.get("items") or []}
        self.resource_version = listing["metadata"]["resourceVersion"]
        self.targets = self._targets()

    @property
    def foreign(self) -> list[str]:
        """Names of the pods that this router does not talk to, as they speak TLS and it does not, or the reverse."""
        return [name for name, pod in self._pods.items() if pod.secure != self.secure]

    def _targets(self) -> list[Target]:
        return targets(self._pods.values(), secure=self.secure)

    def apply(self, kind: str, pod: dict[str, Any]) -> bool:
        """One watch event: ADDED, MODIFIED, DELETED or BOOKMARK. Whether the targets changed, or who is foreign."""
        self.resource_version = pod["metadata"]["resourceVersion"]
        if kind == "BOOKMARK":
            return False
        name = pod["metadata"]["name"]
        before = self.targets, self.foreign
        if kind == "DELETED":
            self._pods.pop(name, None)
        else:
            self._pods[name] = read(pod)
        self.targets = self._targets()
        return (self.targets, self.foreign) != before
