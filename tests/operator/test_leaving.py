"""Nodes that are being emptied: which they are, and what becomes of the groups on them."""

from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from tests.operator.pods import NOW, loading, owner, pending, pod
from tests.operator.test_status import REVISION, SETTINGS, existing

from wherry_operator.planning.leaving import leaving
from wherry_operator.planning.plan import make_plan
from wherry_operator.planning.pods import PodView
from wherry_operator.planning.status import make_status
from wherry_operator.planning.types import Observed, Scale

CORDONED = {"n1": "its node n1 is cordoned"}


def node(name: str = "n1", **spec: Any) -> dict[str, Any]:
    return {"metadata": {"name": name}, "spec": spec}


NODES = [
    (node(), ""),
    (node(unschedulable=True), "its node n1 is cordoned"),
    (node(taints=[{"key": "node.kubernetes.io/unschedulable", "effect": "NoSchedule"}]), "unschedulable"),
    (
        node(taints=[{"key": "ToBeDeletedByClusterAutoscaler", "effect": "NoSchedule"}]),
        "ToBeDeletedByClusterAutoscaler",
    ),
    (node(taints=[{"key": "karpenter.sh/disrupted", "effect": "NoSchedule"}]), "karpenter.sh/disrupted"),
    (node(taints=[{"key": "nvidia.com/gpu", "effect": "NoSchedule"}]), ""),
    (node(taints=[{"key": "node.kubernetes.io/unreachable", "effect": "NoExecute"}]), ""),
]


@pytest.mark.parametrize(("raw", "says"), NODES, ids=[str(raw["spec"]) for raw, _ in NODES])
def test_which_nodes_are_emptied(raw: dict[str, Any], says: str) -> None:
    found = leaving([raw])
    assert bool(found) == bool(says)
    assert says in found.get("n1", "")


@dataclass
class Case:
    name: str
    pods: list[PodView]
    steps: list[str]
    pending: list[str] = field(default_factory=list)
    nodes: dict[str, str] = field(default_factory=lambda: dict(CORDONED))
    spec: dict[str, Any] = field(default_factory=dict)


LACKING = {"unschedulable": "0/2 nodes are available.", "avoids": ("n1",), "age": 900}
CASES = [
    Case("nothing is there", [pod("a", node="n2"), pod("b", node="n3")], []),
    Case("one takes over first", [pod("a"), pod("b", node="n2")], ["create"], ["a"]),
    Case("and loads", [pod("a"), pod("b", node="n2"), loading("c", node="n3")], [], ["a"]),
    Case("then the one there goes", [pod("a"), pod("b", node="n2"), pod("c", node="n3")], ["delete a"]),
    Case("one that never served goes at once", [loading("a"), pod("b", node="n2")], ["create", "delete a"]),
    Case("both are there: one by one", [pod("a", age=9), pod("b")], ["create"], ["1 more", "a", "b"]),
    Case(
        "one may be missing",
        [pod("a"), pod("b", node="n2")],
        ["create", "delete a"],
        spec={"rolloutStrategy": {"maxSurge": 0, "maxUnavailable": 1}},
    ),
    Case("no room: nothing that serves goes", [pod("a"), pod("b", node="n2"), pending("c", **LACKING)], [], ["a"]),
    Case(
        "the node stays after all",
        [pod("a"), pod("b", node="n2"), pending("c", **LACKING)],
        ["delete c"],
        nodes={},
    ),
]


def look(case: Case) -> Observed:
    who = owner(case.spec)
    current = tuple(replace(p, revision=REVISION) for p in case.pods)
    live = frozenset({"n1", "n2", "n3"})
    return Observed(who, current, objects=existing(who), token="token", leaving_nodes=case.nodes, live_nodes=live)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_move(case: Case) -> None:
    plan = make_plan(look(case), Scale(2), SETTINGS, NOW, "t", lambda: "new")
    assert [a.verb if a.verb == "create" else f"{a.verb} {a.name}" for a in plan.actions] == case.steps
    assert sorted(entry.target for entry in plan.pending) == case.pending
    for action in plan.actions:
        if action.verb == "create":
            # Also a pod that tolerates everything must not come back to where it has to leave.
            assert "n1" in str((action.body or {})["spec"]["affinity"]["nodeAffinity"])


def test_a_move_without_room_says_so() -> None:
    case = next(case for case in CASES if case.name.startswith("no room"))
    status = make_status(make_plan(look(case), Scale(2), SETTINGS, NOW, "t", lambda: "new"), SETTINGS, NOW)
    [found] = [c for c in status.conditions or [] if c.type == "InsufficientCapacity"]
    assert (found.status, found.reason) == ("True", "SurgeUnschedulable")
    assert "pod a cannot move, its node n1 is cordoned" in found.message
    assert "0/2 nodes are available" in found.message
    assert "maxUnavailable" in found.message
