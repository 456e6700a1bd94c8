"""The autoscaler: case tables over signals, history and time."""

from datetime import timedelta
from typing import Any

import pytest
from tests.operator.pods import NOW

from wherry_operator.api.v1alpha1 import Scaling
from wherry_operator.autoscaling.decide import Decision, Recommendation, Signal, decide


def scaling(up: str = "0s", down: str = "0s", **targets: Any) -> Scaling:
    return Scaling.model_validate(
        {
            "minReplicas": 1,
            "maxReplicas": 8,
            "targets": targets or {"requestsPerReplica": 10},
            "behavior": {"scaleUp": {"stabilizationWindow": up}, "scaleDown": {"stabilizationWindow": down}},
        }
    )


def load(*requests: int | None) -> list[Signal | None]:
    return [None if r is None else Signal(r, 0.0) for r in requests]


@pytest.mark.parametrize(
    "current, signals, expected, reason",
    [
        (1, load(10), 1, "Steady"),
        (1, load(11), 1, "Steady"),  # within the tolerance of 10%
        (1, load(12), 2, "ScaledUp"),
        (1, load(500), 8, "ScaledUp"),  # the maximum
        (4, load(10, 10, 0, 0), 2, "ScaledDown"),
        (4, load(0, 0, 0, 0), 1, "ScaledDown"),  # the minimum
        (4, load(20, 19, 1, None), 4, "Steady"),
        (4, load(5, 5, 0, None), 4, "Steady"),  # one is unknown, so none goes
        (4, load(5, 5, 0), 4, "Steady"),  # one is not ready, so none goes
        (2, load(40, None), 4, "ScaledUp"),  # the unknown one counts as idle
        (3, load(None, None, None), 3, "NoSignals"),
        (3, [], 3, "NoSignals"),
        (20, [], 8, "NoSignals"),  # the maximum was lowered
        (0, [], 1, "NoSignals"),  # the minimum was raised
    ],
)
def test_requests(current: int, signals: list[Signal | None], expected: int, reason: str) -> None:
    decision = decide(scaling(), current, signals, (), NOW)
    assert (decision.replicas, decision.reason) == (expected, reason)
    assert decision.active == (reason != "NoSignals")
    assert decision.message


@pytest.mark.parametrize(
    "current, signals, queued, expected",
    [
        (1, load(10), 30, 4),
        (4, load(5, 5, 5, 5), 20, 4),
        (2, load(0, None), 30, 3),
        (2, [], 30, 2),  # nobody knows what they do with it
    ],
)
def test_what_waits_in_routers_is_load(current: int, signals: list[Signal | None], queued: int, expected: int) -> None:
    assert decide(scaling(), current, signals, (), NOW, queued).replicas == expected


@pytest.mark.parametrize(
    "used, expected",
    [([0.5, 0.5], 2), ([1.0, 1.0], 4), ([0.1, 0.1], 1), ([0.54, 0.5], 2)],
)
def test_kv_utilization(used: list[float], expected: int) -> None:
    signals = [Signal(0, share) for share in used]
    assert decide(scaling(kvUtilization=50), 2, signals, (), NOW).replicas == expected


def test_the_target_that_asks_for_more_decides() -> None:
    both = scaling(kvUtilization=50, requestsPerReplica=10)
    assert decide(both, 2, [Signal(30, 0.1), Signal(30, 0.1)], (), NOW).replicas == 6
    assert decide(both, 2, [Signal(1, 1.0), Signal(1, 1.0)], (), NOW).replicas == 4


def replay(rules: Scaling, steps: list[tuple[float, int]], current: int) -> list[int]:
    """The replicas after each (seconds, requests on every replica in total)."""
    history: tuple[Recommendation, ...] = (Recommendation(NOW, current),)
    numbers = []
    for seconds, total in steps:
        signals: list[Signal | None] = [Signal(total, 0.0), *[Signal(0, 0.0)] * (current - 1)]
        decision: Decision = decide(rules, current, signals, history, NOW + timedelta(seconds=seconds))
        current, history = decision.replicas, decision.history
        numbers.append(current)
    return numbers


def test_a_short_lull_removes_nothing() -> None:
    steps = [(0, 40), (20, 10), (40, 40), (70, 10), (95, 10), (101, 10)]
    assert replay(scaling(down="1m"), steps, 4) == [4, 4, 4, 4, 4, 1]


def test_a_short_burst_adds_nothing() -> None:
    steps = [(0, 10), (20, 80), (30, 10), (40, 80), (95, 80)]
    assert replay(scaling(up="1m"), steps, 1) == [1, 1, 1, 1, 8]


def test_history_is_bounded_by_the_windows() -> None:
    old = tuple(Recommendation(NOW - timedelta(seconds=s), 2) for s in range(600))
    assert len(decide(scaling(down="1m"), 2, load(10, 10), old, NOW).history) == 62
