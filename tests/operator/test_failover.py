"""Who is lost: case tables over what the operator saw. Times are seconds before now."""

from dataclasses import dataclass, field, replace
from datetime import UTC, datetime

import pytest
from tests.operator.pods import owner, pod

from wherry_operator.planning.failover import NodeSignal, PodSignal, evidence, judge, lost_routers, with_verdict
from wherry_operator.planning.plan import make_plan
from wherry_operator.planning.pods import PodView
from wherry_operator.planning.types import Observed, Scale, Settings

NOW = 1000.0


def worker(name: str, node: str, silent: float | None = None, reached: bool = True, patience: float = 5) -> PodSignal:
    return PodSignal(name, node, None if silent is None else NOW - silent, reached, patience)


def node(name: str, silent: float | None = None, lease: float | None = None, **more: object) -> NodeSignal:
    since = None if silent is None else NOW - silent
    still = None if lease is None else NOW - lease
    given: dict[str, object] = {"kubelet_answered": True, "ready": "True"} | more
    return NodeSignal(name, since, lease_still_since=still, **given)  # type: ignore[arg-type]


@dataclass
class Case:
    name: str
    pods: list[PodSignal]
    nodes: list[NodeSignal]
    lost: list[str] = field(default_factory=list)
    isolated: bool = False
    api: bool = True


OTHERS = [node("n2"), node("n3")]

CASES = [
    Case("all is well", [worker("a", "n1")], [node("n1"), *OTHERS]),
    Case("a node is killed", [worker("a", "n1", 6)], [node("n1", 5), *OTHERS], ["a"]),
    Case("not yet", [worker("a", "n1", 4)], [node("n1", 4), *OTHERS]),
    Case("more patience was asked for", [worker("a", "n1", 20, patience=30)], [node("n1", 20), *OTHERS]),
    Case("frozen process on a live node", [worker("a", "n1", 600)], [node("n1"), *OTHERS]),
    Case("the kubelet missed one probe", [worker("a", "n1", 60)], [node("n1", 1), *OTHERS]),
    Case("only the kubelet is silent", [worker("a", "n1")], [node("n1", 600), *OTHERS]),
    Case(
        "another worker of the node answers",
        [worker("a", "n1", 60), worker("b", "n1")],
        [node("n1", 60), *OTHERS],
    ),
    Case("the Lease says it", [worker("a", "n1", 16)], [node("n1", lease=16, kubelet_answered=False), *OTHERS], ["a"]),
    Case("a Lease that is a little late", [worker("a", "n1", 14)], [node("n1", lease=14), *OTHERS]),
    Case("the condition says it", [worker("a", "n1", 6)], [node("n1", ready="Unknown"), *OTHERS], ["a"]),
    Case("the Node is deleted", [worker("a", "n1", 6)], [node("n1", deleted=True), *OTHERS], ["a"]),
    Case("nothing may be read but the kubelet", [worker("a", "n1", 6)], [node("n1", 6, ready=""), *OTHERS], ["a"]),
    Case(
        "a kubelet that never answered says nothing",
        [worker("a", "n1", 60)],
        [node("n1", 60, kubelet_answered=False), *OTHERS],
    ),
    # Workers that this operator never reached: it has just started, or may not reach them.
    Case("never reached: one signal is not enough", [worker("a", "n1", 60, reached=False)], [node("n1", 60), *OTHERS]),
    Case(
        "never reached: two are",
        [worker("a", "n1", 60, reached=False)],
        [node("n1", 60, lease=60), *OTHERS],
        ["a"],
    ),
    # The operator suspects itself.
    Case("half of the nodes", [worker("a", "n1", 6), worker("b", "n2")], [node("n1", 6), node("n2")], ["a"]),
    Case(
        "more than half of the nodes",
        [worker("a", "n1", 6), worker("b", "n2", 6), worker("c", "n3")],
        [node("n1", 6), node("n2", 6), node("n3")],
        isolated=True,
    ),
    Case(
        "the others are only a moment behind the first",
        [worker("a", "n1", 6), worker("b", "n2", 1), worker("c", "n3", 1)],
        [node("n1", 5), node("n2", 1), node("n3", 1)],
        isolated=True,
    ),
    Case("the only node that it knows", [worker("a", "n1", 60)], [node("n1", 60)], isolated=True),
    Case(
        "nodes that it never heard of are nothing to compare with",
        [worker("a", "n1", 60)],
        [node("n1", 60), node("n2", 60, kubelet_answered=False), node("n3", kubelet_answered=False)],
        isolated=True,
    ),
    Case("with a second, idle node", [worker("a", "n1", 60)], [node("n1", 60), node("n2")], ["a"]),
    Case("the API server is away too", [worker("a", "n1", 60)], [node("n1", 60), *OTHERS], isolated=True, api=False),
    Case(
        "two of five, with all their pods",
        [worker("a", "n1", 9), worker("b", "n1", 9), worker("c", "n2", 7), worker("d", "n3")],
        [node("n1", 8), node("n2", 6), node("n3"), node("n4"), node("n5")],
        ["a", "b", "c"],
    ),
    Case(
        "a pod that was bound to the lost node goes with the first",
        [worker("a", "n1", 20), worker("b", "n1", 6, reached=False)],
        [node("n1", 20), *OTHERS],
        ["a", "b"],
    ),
    # A pod that has no address yet, on a node that died under it.
    Case(
        "starting, on a dead node",
        [worker("a", "n1", 60, reached=False)],
        [node("n1", 60, ready="Unknown"), *OTHERS],
        ["a"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    verdict = judge(case.pods, case.nodes, NOW, case.api)
    assert sorted(verdict.lost) == case.lost
    assert bool(verdict.isolated) == case.isolated
    assert set(verdict.nodes) == {p.node for p in case.pods if p.uid in case.lost}


def test_every_signal_has_its_words() -> None:
    told = evidence(node("n1", 7, 21, ready="Unknown", deleted=True), NOW)
    assert told == [
        "its Node has been deleted",
        "its kubelet has not answered for 7 s",
        "its Lease has not been renewed for 21 s",
        "its condition Ready is Unknown",
    ]


def test_the_reason_names_both_signals() -> None:
    [why] = judge([worker("a", "n1", 6)], [node("n1", 5), *OTHERS], NOW).lost.values()
    assert why == ("was lost with node n1: it has been out of reach for 6 s, and its kubelet has not answered for 5 s")


def test_an_operator_that_suspects_itself_says_how_much_it_sees() -> None:
    verdict = judge([worker("a", "n1", 6), worker("b", "n2", 6)], [node("n1", 6), node("n2", 6)], NOW)
    assert "2 of 2 nodes" in verdict.isolated


def test_the_snapshot_takes_the_verdict_over() -> None:
    observed = Observed(owner(), (pod("a"), replace(pod("b"), node="n2")), (pod("r"),))
    workers = [worker("uid-a", "n1", 6), worker("uid-b", "n2"), worker("uid-r", "n1", 6)]
    verdict = judge(workers, [node("n1", 6), node("n2")], NOW)
    marked = with_verdict(observed, verdict)
    assert [p.lost for p in marked.pods] == [True, False]
    assert [p.lost for p in marked.router_pods] == [True]
    assert marked.lost_nodes == ("n1",)


def test_a_lost_router_is_deleted_once() -> None:
    lost, leaving = replace(pod("r"), lost_because="was lost with node n1"), pod("s", deleting=True)
    made = lost_routers(Observed(owner(), router_pods=(lost, pod("t"), replace(leaving, lost_because="too"))))
    assert [(action.verb, action.name, action.uid) for action in made] == [("delete", "r", "uid-r")]


def test_deletion_does_not_wait_for_a_lost_node() -> None:
    def steps(*pods: PodView) -> list[tuple[str, str]]:
        observed = Observed(replace(owner(), deleting=True), pods)
        plan = make_plan(observed, Scale(0), Settings(), datetime(2026, 1, 1, tzinfo=UTC), "token", lambda: "x")
        return [(action.verb, action.name) for action in plan.actions]

    lost = pod("a", lost_because="was lost with node n1")
    assert steps(lost) == [("delete", "a")]
    assert steps(replace(lost, deleting=True), pod("b", deleting=True)) == []
    assert steps(replace(lost, deleting=True)) == [("finalizers", "chat")]
