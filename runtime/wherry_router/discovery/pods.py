"""From a pod to a place to send requests to. Pure: reads the pod's JSON, does no I/O."""

from typing import Any

from wherry_protocol.naming import WORKER_PORT
from wherry_router.pool import Endpoint


def routable(pod: dict[str, Any]) -> Endpoint | None:
    """The pod's endpoint, if requests may go there: it is Ready, has an address and is not being deleted."""
    metadata, status = pod.get("metadata") or {}, pod.get("status") or {}
    address = status.get("podIP")
    if not address or metadata.get("deletionTimestamp"):
        return None
    conditions = status.get("conditions") or []
    if not any(condition.get("type") == "Ready" and condition.get("status") == "True" for condition in conditions):
        return None
    host = f"[{address}]" if ":" in address else address
    return Endpoint(name=f"{metadata.get('name')}/{metadata.get('uid')}", url=f"http://{host}:{_port(pod)}")


def _port(pod: dict[str, Any]) -> int:
    """The port that the runtime container calls `http`."""
    for container in (pod.get("spec") or {}).get("containers") or []:
        for port in container.get("ports") or []:
            if port.get("name") == "http":
                return int(port["containerPort"])
    return WORKER_PORT


class PodSet:
    """The pods that a list and the watch events after it add up to."""

    def __init__(self) -> None:
        self._pods: dict[str, Endpoint | None] = {}
        self.resource_version = ""

    def reset(self, listing: dict[str, Any]) -> None:
        """A fresh list replaces everything."""
        self._pods = {pod["metadata"]["name"]: routable(pod) for pod in listing.get("items") or []}
        self.resource_version = listing["metadata"]["resourceVersion"]

    def apply(self, kind: str, pod: dict[str, Any]) -> bool:
        """One watch event: ADDED, MODIFIED, DELETED or BOOKMARK. Whether the endpoints may have changed."""
        self.resource_version = pod["metadata"]["resourceVersion"]
        if kind == "BOOKMARK":
            return False
        name = pod["metadata"]["name"]
        before = self._pods.get(name)
        if kind == "DELETED":
            self._pods.pop(name, None)
            return before is not None
        self._pods[name] = routable(pod)
        return self._pods[name] != before

    def endpoints(self) -> list[Endpoint]:
        """Where requests may go."""
        return [endpoint for endpoint in self._pods.values() if endpoint is not None]
