"""How many replicas the load asks for. Pure: signals, history and the time in, a number and its reason out.

The rule is that of the HorizontalPodAutoscaler (https://kubernetes.io/docs/concepts/workloads/autoscaling/): for each
target `ceil(total / target)`, the largest wins, and a change within the tolerance is none. Then windows: up goes to the
smallest recommendation of the scale-up window, down to the largest of the scale-down window. A replica whose load is
unknown is taken as idle when scaling up and forbids scaling down.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from wherry_operator.api.kube import parse_duration
from wherry_operator.api.v1alpha1 import Scaling

TOLERANCE = 0.1


@dataclass(frozen=True)
class Signal:
    """One ready replica's load: requests running and waiting, and the share of its KV cache in use (0 to 1)."""

    requests: int
    kv_utilization: float


@dataclass(frozen=True)
class Recommendation:
    """What the load alone asked for at some time."""

    at: datetime
    replicas: int


@dataclass(frozen=True)
class Decision:
    """The number of replicas, why, and the history to hand in next time. `active`: signals were there to go by."""

    replicas: int
    reason: str
    message: str
    active: bool
    history: tuple[Recommendation, ...]


def decide(
    scaling: Scaling,
    current: int,
    signals: Sequence[Signal | None],
    history: Sequence[Recommendation],
    now: datetime,
    queued: int = 0,
) -> Decision:
    """How many replicas should run.

    Args:
        scaling: bounds, targets and windows.
        current: replicas that should run so far.
        signals: one for every ready replica; None where it did not answer.
        history: earlier recommendations, of the longest window at least.
        now: UTC.
        queued: requests that wait in the routers.
    """
    low, high = scaling.min_replicas, scaling.max_replicas
    bounded = min(max(current, low), high)
    known = [signal for signal in signals if signal is not None]
    missing = max(0, current - len(known))
    if not known:
        message = "no replica reports its load; the number of replicas stays"
        return Decision(bounded, "NoSignals", message, False, tuple(history))
    wanted, why = _recommend(scaling, bounded, known, queued)
    wanted = min(max(wanted, low), high)
    if missing and wanted < bounded:
        wanted, why = bounded, f"{missing} of {current} replicas do not report their load, so none is removed"
    history = _keep(scaling, [*history, Recommendation(now, wanted)], now)
    steady = _stabilise(scaling, bounded, history, now)
    reason = "ScaledUp" if steady > bounded else "ScaledDown" if steady < bounded else "Steady"
    if steady == bounded and wanted != bounded:
        why += f"; {wanted} replicas once the stabilization window has passed"
    return Decision(steady, reason, why, True, tuple(history))


def _recommend(scaling: Scaling, current: int, known: Sequence[Signal], queued: int) -> tuple[int, str]:
    targets = scaling.targets
    answers = []
    if targets.requests_per_replica:
        total = sum(signal.requests for signal in known) + queued
        wanted = _toward(current, total / targets.requests_per_replica)
        answers.append((wanted, f"{total} requests for a target of {targets.requests_per_replica} per replica"))
    if targets.kv_utilization:
        total_share = sum(signal.kv_utilization for signal in known)
        wanted = _toward(current, total_share * 100 / targets.kv_utilization)
        mean = round(100 * total_share / len(known))
        answers.append((wanted, f"{mean}% of the KV cache in use for a target of {targets.kv_utilization}%"))
    return max(answers, key=lambda answer: answer[0])


def _toward(current: int, exact: float) -> int:
    if current and abs(exact / current - 1) <= TOLERANCE + 1e-9:
        return current
    return math.ceil(exact - 1e-9)


def _windows(scaling: Scaling) -> tuple[timedelta, timedelta]:
    up = parse_duration(scaling.behavior.scale_up.stabilization_window)
    down = parse_duration(scaling.behavior.scale_down.stabilization_window)
    return timedelta(seconds=up), timedelta(seconds=down)


def _keep(scaling: Scaling, history: Sequence[Recommendation], now: datetime) -> list[Recommendation]:
    since = now - max(_windows(scaling))
    return [entry for entry in history if entry.at >= since]


def _stabilise(scaling: Scaling, current: int, history: Sequence[Recommendation], now: datetime) -> int:
    up, down = _windows(scaling)
    floor = min(entry.replicas for entry in history if entry.at >= now - up)
    ceiling = max(entry.replicas for entry in history if entry.at >= now - down)
    return min(max(current, floor), ceiling)
