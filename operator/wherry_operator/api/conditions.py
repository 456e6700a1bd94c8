"""Conditions: how they are set and carried over. Pure."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from wherry_operator.api.v1alpha1 import Condition

READY = "Ready"
AVAILABLE = "Available"
PROGRESSING = "Progressing"
ROUTER_READY = "RouterReady"
MODEL_LOADED = "ModelLoaded"
SCALING_ACTIVE = "ScalingActive"
DEGRADED = "Degraded"
INSUFFICIENT_CAPACITY = "InsufficientCapacity"

# The API server's bounds of metav1.Condition.
MAX_MESSAGE = 1024


@dataclass(frozen=True)
class Finding:
    """A condition before it is dated."""

    type: str
    status: bool | None
    reason: str
    message: str


def dated(
    findings: Iterable[Finding], previous: Iterable[dict[str, Any]], now: str, generation: int
) -> list[Condition]:
    """The findings as conditions; `lastTransitionTime` moves only where `status` did."""
    before = {condition.get("type"): condition for condition in previous}
    conditions = []
    for finding in findings:
        status = "Unknown" if finding.status is None else str(finding.status)
        old = before.get(finding.type, {})
        since = old.get("lastTransitionTime", now) if old.get("status") == status else now
        message = finding.message
        if len(message) > MAX_MESSAGE:
            message = message[: MAX_MESSAGE - 1] + "…"
        conditions.append(
            Condition.model_validate(
                {
                    "type": finding.type,
                    "status": status,
                    "reason": finding.reason,
                    "message": message,
                    "lastTransitionTime": since,
                    "observedGeneration": generation,
                }
            )
        )
    return conditions
