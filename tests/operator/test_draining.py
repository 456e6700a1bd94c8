"""Draining and the readiness gate: case tables. The drain timeout is 300 s; routers get the last 10 s of it."""

import random
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

import pytest
from tests.operator.pods import NOW, at, failed, loading, pending, pod

from wherry_operator.planning.draining import RESUME_MARGIN_S, plan_drains
from wherry_operator.planning.group import group_views
from wherry_operator.planning.groups import Deletion, plan_groups
from wherry_operator.planning.pods import PodView
from wherry_operator.planning.routers import SILENT_S, Routers, plan_gates
from wherry_operator.planning.types import Action
from wherry_protocol.naming import ANNOTATION_DRAIN, GATE_ROUTABLE
from wherry_protocol.router_report import ReplicaReport, ReplicaState, RouterReport

TIMEOUT_S = 300.0
LATER, PAST = NOW + timedelta(seconds=100), at(RESUME_MARGIN_S)
NOBODY = Routers()


def serving(name: str, **more: Any) -> PodView:
    return pod(name, **{"containers_ready": at(60)} | more)


def knows(*replicas: tuple[str, ReplicaState, int]) -> RouterReport:
    """A router's report; replicas by the names of their pods."""
    found = [ReplicaReport(name=f"{name}/uid-{name}", state=state, in_flight=count) for name, state, count in replicas]
    return RouterReport(replicas=found, draining=False)


def routers(*reports: RouterReport | None) -> Routers:
    """One router for each report; None is one that does not answer."""
    return Routers(tuple(f"r{i}" for i in range(len(reports))), tuple(r for r in reports if r is not None))


def steps(actions: tuple[Action, ...]) -> list[str]:
    words = {True: "unmark", False: "mark"}
    return [
        f"{words[(a.body or {}).get(ANNOTATION_DRAIN) is None] if a.verb == 'annotate' else a.verb} {a.name}"
        for a in actions
    ]


@dataclass
class Case:
    name: str
    pods: list[PodView]
    going: str = "a"
    routers: Routers = NOBODY
    does: list[str] = field(default_factory=list)
    waits: list[str] = field(default_factory=list)
    says: str = ""
    graceful: bool = True


ONE = routers(knows(("a", "routable", 2), ("b", "routable", 1)))
IDLE = routers(knows(("a", "draining", 0), ("b", "routable", 1)))
CASES = [
    Case("no router: nobody has a stream there", [serving("a")], does=["delete a"]),
    Case("it is marked first", [serving("a"), serving("b")], routers=ONE, does=["mark a"], waits=["a"], says="2 req"),
    Case("also before routers were asked", [serving("a")], routers=routers(None), does=["mark a"], waits=["a"]),
    Case(
        "marked and busy: it waits",
        [serving("a", drain=LATER)],
        routers=routers(knows(("a", "draining", 1))),
        waits=["a"],
        says="until 2026-01-01T12:01:40Z: 1 request is left",
    ),
    Case(
        "marked and idle: it goes", [serving("a", drain=LATER)], routers=IDLE, does=["delete a"], says="it is drained"
    ),
    Case(
        "idle, but the router has not seen the mark: a request may still come",
        [serving("a", drain=LATER)],
        routers=routers(knows(("a", "routable", 0))),
        waits=["a"],
    ),
    Case("no router knows it", [serving("a", drain=LATER)], routers=routers(knows()), does=["delete a"]),
    Case(
        "every router has to agree",
        [serving("a", drain=LATER)],
        routers=routers(knows(("a", "draining", 0)), knows(("a", "draining", 3))),
        waits=["a"],
        says="3 requests are left",
    ),
    Case(
        "a router that does not answer may have streams",
        [serving("a", drain=LATER)],
        routers=routers(knows(("a", "draining", 0)), None),
        waits=["a"],
        says="1 of 2 routers did not answer",
    ),
    Case(
        "its time is over, busy or not",
        [serving("a", drain=PAST)],
        routers=routers(knows(("a", "draining", 1)), None),
        does=["delete a"],
        says="its time to drain is over, 1 request is left",
    ),
    Case(
        "routers get a moment after the time is over",
        [serving("a", drain=at(RESUME_MARGIN_S - 1))],
        routers=routers(knows(("a", "draining", 1))),
        waits=["a"],
    ),
    Case("wanted again", [serving("a", drain=LATER)], going="", routers=ONE, does=["unmark a"]),
    Case("wanted again, though its time is over", [serving("a", drain=PAST)], going="", does=["unmark a"]),
    Case("a mark by someone else is removed", [serving("a"), serving("b", drain=LATER)], going="", does=["unmark b"]),
    Case("not marked and not going", [serving("a"), serving("b")], going="", routers=ONE),
    Case("deleted already", [serving("a", drain=LATER, deleting=True)], going="", routers=ONE),
    Case("it never served", [pending("a"), serving("b")], routers=routers(knows()), does=["delete a"]),
    Case("it loads", [loading("a")], routers=routers(None), does=["delete a"]),
    Case("it served, and does not now", [loading("a", was_ready=True)], routers=ONE, does=["mark a"], waits=["a"]),
    Case(
        "its containers are ready, its gate is shut: routers use it",
        [serving("a", ready=False, gated=True)],
        routers=ONE,
        does=["mark a"],
        waits=["a"],
    ),
    Case("it is lost: nothing to wait for", [failed("a")], routers=ONE, does=["delete a"], graceful=False),
    Case(
        "a group is marked whole",
        [serving(f"a-{i}", group="a", index=i, group_size=2) for i in range(2)],
        routers=routers(knows(("a-0", "routable", 1))),
        does=["mark a-0", "mark a-1"],
        waits=["a"],
    ),
    Case(
        "half marked: the rest gets the same time",
        [serving("a-0", group="a", group_size=2, drain=LATER), serving("a-1", group="a", index=1, group_size=2)],
        routers=routers(knows(("a-0", "draining", 1))),
        does=["mark a-1"],
        waits=["a"],
        says="2026-01-01T12:01:40Z",
    ),
    Case(
        "a group goes whole",
        [serving(f"a-{i}", group="a", index=i, group_size=2, drain=LATER) for i in range(2)],
        routers=routers(knows(("a-0", "draining", 0))),
        does=["delete a-0", "delete a-1"],
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_drain(case: Case) -> None:
    groups = group_views(case.pods)
    deletions = [Deletion(group, "too many", case.graceful) for group in groups if group.key == case.going]
    made = plan_drains(deletions, groups, case.routers, NOW, TIMEOUT_S)
    assert steps(made.actions) == case.does
    assert [entry.target for entry in made.pending] == case.waits
    assert (made.retry_after is not None) == bool(case.waits)
    assert case.says in "; ".join([*(a.reason for a in made.actions), *(p.reason for p in made.pending)])
    assert all(action.uid == f"uid-{action.name}" for action in made.actions), "another pod by that name is not meant"


@pytest.mark.parametrize(
    ("timeout", "mark"), [(300, "12:04:50"), (10, "12:00:05"), (0, "12:00:00")], ids=["usual", "short", "none"]
)
def test_the_mark_leaves_time_to_move_what_is_left(timeout: float, mark: str) -> None:
    groups = group_views([serving("a")])
    [action] = plan_drains([Deletion(groups[0], "x")], groups, ONE, NOW, timeout).actions
    assert action.body == {ANNOTATION_DRAIN: f"2026-01-01T{mark}Z"}


@dataclass
class Gate:
    name: str
    pods: list[PodView]
    routers: Routers = NOBODY
    opens: list[str] = field(default_factory=list)
    why: str = ""
    waits: list[str] = field(default_factory=list)


def shut(name: str, since_s: float = 1, **more: Any) -> PodView:
    return pod(name, **{"ready": False, "gated": True, "containers_ready": at(since_s)} | more)


GATES = [
    Gate("a router knows it", [shut("a")], routers(knows(("a", "routable", 0))), ["a"], "KnownToRouter"),
    Gate("one of two is enough", [shut("a")], routers(None, knows(("a", "routable", 0))), ["a"], "KnownToRouter"),
    Gate("no router knows it yet", [shut("a")], routers(knows(("b", "routable", 0))), waits=["a"]),
    Gate("no router answers yet", [shut("a")], routers(None), waits=["a"]),
    Gate("no router answers for long", [shut("a", SILENT_S)], routers(None, None), ["a"], "RoutersSilent"),
    Gate("those that answer are believed", [shut("a", 999)], routers(None, knows()), waits=["a"]),
    Gate("no router runs", [shut("a")], NOBODY, ["a"], "NoRouter"),
    Gate("its containers are not ready", [shut("a", containers_ready=None)], NOBODY),
    Gate("it was made before there were gates", [serving("a")], ONE),
    Gate("it is being deleted", [shut("a", deleting=True)], NOBODY),
    Gate(
        "a group opens whole, by its pod 0",
        [shut(f"a-{i}", group="a", index=i, group_size=2) for i in range(2)],
        routers(knows(("a-0", "routable", 0))),
        ["a-0", "a-1"],
        "KnownToRouter",
    ),
    Gate(
        "a group of which one is not ready",
        [shut("a-0", group="a", group_size=2), loading("a-1", group="a", index=1, group_size=2)],
        NOBODY,
    ),
]


@pytest.mark.parametrize("case", GATES, ids=lambda case: case.name)
def test_gate(case: Gate) -> None:
    made = plan_gates(group_views(case.pods), case.routers, NOW)
    assert [action.name for action in made.actions] == case.opens
    assert [entry.target for entry in made.pending] == case.waits
    assert (made.retry_after is not None) == bool(case.waits)
    for action in made.actions:
        assert (action.verb, action.uid) == ("condition", f"uid-{action.name}")
        assert action.body is not None
        assert (action.body["type"], action.body["status"], action.body["reason"]) == (GATE_ROUTABLE, "True", case.why)


BUSY = {"a": 9, "b": 3, "c": 5}
SCALE_IN = [
    ("the least busy goes", [serving(n) for n in "abc"], 2, ["b"]),
    ("equally busy: the youngest", [serving("x", age=5), serving("y", age=3), serving("z", age=9)], 2, ["y"]),
    ("not ready before busy", [serving("a"), serving("b"), loading("c")], 2, ["c"]),
    ("what drains already, goes on draining", [serving("a", drain=LATER), serving("b"), serving("c")], 2, ["a"]),
    ("two go", [serving(n) for n in "abc"], 1, ["b", "c"]),
]


@pytest.mark.parametrize(("name", "pods", "replicas", "goes"), SCALE_IN, ids=[entry[0] for entry in SCALE_IN])
def test_scale_in(name: str, pods: list[PodView], replicas: int, goes: list[str]) -> None:
    plan = plan_groups(tuple(pods), replicas, "new", 1, 0, NOW, busy=BUSY)
    assert sorted(deletion.group.key for deletion in plan.deletions) == goes


@pytest.mark.parametrize("seed", range(30))
def test_any_history_drains_before_it_deletes_and_ends_unmarked(seed: int) -> None:
    """Random scalings and loads: no busy group is deleted before its time, and what stays carries no mark."""
    rng = random.Random(seed)
    pods = [serving(f"p{i}", age=i) for i in range(rng.randint(1, 6))]
    load = {p.name: rng.randint(0, 3) for p in pods}
    wanted, now = rng.randint(0, 6), NOW
    for step in range(80):
        if step < 50 and rng.random() < 0.2:
            wanted = rng.randint(0, 6)
        now += timedelta(seconds=rng.choice([1, 20]))
        seen = routers(knows(*((p.name, "draining" if p.drain else "routable", load[p.name]) for p in pods)))
        groups = group_views(pods)
        busy = {group.key: seen.about(group).in_flight for group in groups}
        plan = plan_groups(tuple(pods), wanted, "new", 1, 0, now, busy=busy)
        for action in plan_drains(plan.deletions, groups, seen, now, TIMEOUT_S).actions:
            index = next(i for i, p in enumerate(pods) if p.name == action.name)
            if action.verb == "delete":
                over = pods[index].drain is not None and now >= pods[index].drain + timedelta(seconds=RESUME_MARGIN_S)
                assert pods[index].drain is not None, "not drained"
                assert load[action.name] == 0 or over, "a stream was cut"
                del pods[index]
            else:
                text = (action.body or {})[ANNOTATION_DRAIN]
                pods[index] = replace(pods[index], drain=datetime.fromisoformat(text) if text else None)
        for p in pods:
            load[p.name] = max(0, load[p.name] - 1) if p.drain else rng.randint(0, 3)
        for _ in plan.creations:
            pods.append(serving(f"n{step}-{len(pods)}"))
            load[pods[-1].name] = 0
    assert len(pods) == wanted
    assert not [p.name for p in pods if p.drain]
