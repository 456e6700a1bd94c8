"""Small builders for the pure tests."""

from datetime import UTC, datetime, timedelta
from typing import Any

from wherry_operator.api.resource import FINALIZER, LLMDeployment
from wherry_operator.planning.pods import ContainerState, PodView

NOW = datetime(2026, 1, 1, 12, 0, 0, tzinfo=UTC)


def at(seconds: float) -> datetime:
    """`seconds` before now."""
    return NOW - timedelta(seconds=seconds)


def pod(name: str, revision: str = "new", *, age: float = 100, **more: Any) -> PodView:
    """A pod; ready unless told otherwise."""
    given: dict[str, Any] = {"group": name, "phase": "Running", "ready": True, "node": "n1"} | more
    return PodView(name=name, uid=f"uid-{name}", revision=revision, created=at(age), **given)


def pending(name: str, revision: str = "new", **more: Any) -> PodView:
    return pod(name, revision, **{"phase": "Pending", "ready": False, "node": ""} | more)


def loading(name: str, revision: str = "new", **more: Any) -> PodView:
    return pod(name, revision, **{"ready": False, "container": ContainerState("runtime", started=at(50))} | more)


def failed(name: str, revision: str = "new", *, ago: float = 0, **more: Any) -> PodView:
    return pod(name, revision, **{"phase": "Failed", "ready": False, "reason": "Evicted", "finished": at(ago)} | more)


def owner(spec: dict[str, Any] | None = None, **metadata: Any) -> LLMDeployment:
    base = {"model": {"name": "tiny", "uri": "sample://tiny"}}
    given = {"name": "chat", "namespace": "default", "uid": "u1", "generation": 3, "finalizers": [FINALIZER]} | metadata
    status = given.pop("status", {})
    return LLMDeployment.from_raw({"metadata": given, "spec": base | (spec or {}), "status": status})
