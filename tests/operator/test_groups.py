"""The group planner: case tables. R is ready, P pending, L loading, F failed; `new` is the wanted revision."""

import random
from dataclasses import dataclass, field, replace

import pytest
from tests.operator.pods import NOW, failed, loading, pending, pod

from wherry_operator.planning.groups import backoff, bounds, plan_groups
from wherry_operator.planning.pods import PodView


@dataclass
class Case:
    name: str
    pods: list[PodView]
    replicas: int = 2
    surge: int = 1
    unavailable: int = 0
    creates: int = 0
    deletes: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    retry: float | None = None


CASES = [
    Case("nothing yet", [], creates=2),
    Case("one is missing", [pod("a")], creates=1),
    Case("as it should be", [pod("a"), pod("b")]),
    Case("loading ones count", [pod("a"), loading("b")]),
    Case("a deleted one is replaced", [pod("a"), pod("b", deleting=True)], creates=1),
    Case("stopped", [pod("a"), pending("b")], replicas=0, deletes=["a", "b"]),
    Case("scale down takes the pending one", [pod("a", age=5), pending("b"), pod("c")], deletes=["b"]),
    Case("scale down takes the loading one", [pod("a"), loading("b", age=500), pod("c")], deletes=["b"]),
    Case(
        "scale down takes the youngest of the ready",
        [pod("a", age=9), pod("b", age=3), pod("c", age=5)],
        2,
        deletes=["b"],
    ),
    # Rollout with surge.
    Case(
        "rollout begins with a surge pod", [pod("a", "old"), pod("b", "old")], creates=1, pending=["a", "b", "1 more"]
    ),
    Case(
        "and waits until that is ready",
        [pod("a", "old"), pod("b", "old"), loading("c")],
        pending=["a", "b", "1 more"],
    ),
    Case(
        "then takes the oldest old one down, and goes on in the same step",
        [pod("a", "old", age=5), pod("b", "old", age=9), pod("c")],
        deletes=["b"],
        creates=1,
        pending=["a"],
    ),
    Case("the last old one", [pod("a", "old"), pod("c"), pod("d")], deletes=["a"]),
    Case(
        "old ones that never served go at once",
        [pending("a", "old"), pod("b", "old")],
        deletes=["a"],
        creates=2,
        pending=["b"],
    ),
    Case(
        "an old one that flickers is kept while it is needed",
        [loading("a", "old", was_ready=True), pod("b", "old")],
        creates=1,
        pending=["a", "b", "1 more"],
    ),
    Case(
        "an old one that flickers goes once enough are ready",
        [loading("a", "old", was_ready=True), pod("b", "old"), pod("c")],
        deletes=["a"],
        creates=1,
        pending=["b"],
    ),
    Case(
        "without surge an old one goes first",
        [pod("a", "old", age=900), pod("b", "old")],
        surge=0,
        unavailable=1,
        deletes=["a"],
        creates=1,
        pending=["b", "1 more"],
    ),
    Case(
        "without surge the next waits for the first",
        [pod("b", "old"), loading("c")],
        surge=0,
        unavailable=1,
        pending=["b", "1 more"],
    ),
    Case(
        "an unschedulable surge pod deletes nothing",
        [pod("a", "old"), pod("b", "old"), pending("c", unschedulable="no memory")],
        pending=["a", "b", "1 more"],
    ),
    Case(
        "an unschedulable surge pod with maxUnavailable goes on by taking one down",
        [pod("a", "old", age=900), pod("b", "old"), pending("c", unschedulable="no memory")],
        unavailable=1,
        deletes=["a"],
        creates=1,
        pending=["b"],
    ),
    Case(
        "reverted midway: the surge pod goes, the serving ones stay",
        [pod("a"), pod("b"), loading("c", "newer")],
        deletes=["c"],
    ),
    Case(
        "reverted midway: a ready one of the reverted revision stays until the lost one is back",
        [pod("a"), pod("c", "newer")],
        creates=1,
        pending=["c"],
    ),
    Case(
        "scaled down in a rollout",
        [pod(n, "old") for n in "abcde"],
        2,
        deletes=["a", "b", "c"],
        creates=1,
        pending=["d", "e", "1 more"],
    ),
    Case("rollout of a single replica", [pod("a", "old")], 1, creates=1, pending=["a"]),
    # Failures.
    Case("the first failure is replaced at once", [failed("a"), pod("b")], creates=1, deletes=["a"]),
    Case("the second waits", [failed("a", failures=1), pod("b")], pending=["instead of a"], retry=10),
    Case("until its time has come", [failed("a", failures=1, ago=11), pod("b")], creates=1, deletes=["a"]),
    Case(
        "a held one is not missed",
        [failed("a", failures=3), failed("b", failures=2)],
        pending=["instead of a", "instead of b"],
        retry=20,
    ),
    Case("a long life starts anew", [failed("a", failures=5, age=4000), pod("b")], creates=1, deletes=["a"]),
    Case("failed and old: no wait", [failed("a", "old", failures=5), pod("b")], creates=1, deletes=["a"]),
    Case("failed and not wanted any more", [failed("a", failures=5), pod("b")], 1, deletes=["a"]),
    Case("a lost node", [pod("a", reason="NodeLost"), pod("b")], creates=1, deletes=["a"]),
    Case("a crash loop is the kubelet's", [loading("a"), pod("b")]),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    plan = plan_groups(tuple(case.pods), case.replicas, "new", case.surge, case.unavailable, NOW)
    assert len(plan.creations) == case.creates
    assert sorted(deletion.group.name for deletion in plan.deletions) == case.deletes
    assert sorted(entry.target for entry in plan.pending) == sorted(case.pending)
    assert plan.retry_after == case.retry
    assert all(action.reason for action in [*plan.creations, *plan.deletions, *plan.pending])


def test_the_failure_count_goes_to_the_replacement() -> None:
    plan = plan_groups((failed("a", failures=2, ago=100), pod("b")), 3, "new", 1, 0, NOW)
    assert [creation.failures for creation in plan.creations] == [3, 0]


@pytest.mark.parametrize(
    "surge, unavailable, replicas, expected",
    [
        (1, 0, 4, (1, 0)),
        ("25%", "25%", 4, (1, 1)),
        ("25%", "25%", 3, (1, 0)),
        ("0%", "10%", 3, (0, 1)),
        ("100%", 0, 3, (3, 0)),
    ],
)
def test_bounds(surge: int | str, unavailable: int | str, replicas: int, expected: tuple[int, int]) -> None:
    assert bounds(surge, unavailable, replicas) == expected


def test_backoff_grows_and_is_bounded() -> None:
    assert [backoff(count) for count in (1, 2, 3, 4, 20)] == [0, 10, 20, 40, 300]


@pytest.mark.parametrize("seed", range(40))
def test_any_history_keeps_the_bounds_and_ends_well(seed: int) -> None:
    """Random clusters, each step carried out in part only, while pods become ready, flicker and fail at random."""
    rng = random.Random(seed)
    replicas, surge, unavailable = rng.randint(0, 5), rng.randint(0, 2), rng.randint(0, 2)
    if not surge + unavailable:
        surge = 1
    pods = [rng.choice([pod, loading, pending])(f"p{i}", rng.choice(["old", "older", "new"])) for i in range(6)]
    number = len(pods)
    for step in range(120):
        calm = step > 60
        before = {p.name: p for p in pods}
        plan = plan_groups(tuple(pods), replicas, "new", surge, unavailable, NOW)
        ready = sum(p.ready for p in pods)
        taken = [d for d in plan.deletions if d.group.ready and d.group.revision != "new"]
        assert not taken or ready - len(taken) >= replicas - unavailable
        assert len(pods) + len(plan.creations) - len(plan.deletions) <= max(len(pods), replicas + surge)
        todo = [*plan.creations, *plan.deletions]
        for action in todo if calm else todo[: rng.randint(0, len(todo))]:
            if action in plan.creations:
                number += 1
                pods.append(pending(f"p{number}"))
            else:
                pods.remove(before[action.group.name])  # type: ignore[union-attr]
        pods = [replace(p, ready=p.phase != "Failed" and (calm or rng.random() < 0.7)) for p in pods]
        if not calm and pods and rng.random() < 0.2:
            lost = rng.randrange(len(pods))
            pods[lost] = failed(pods[lost].name, pods[lost].revision, ago=1000)
    assert len(pods) == replicas
    assert all(p.ready and p.revision == "new" for p in pods)
