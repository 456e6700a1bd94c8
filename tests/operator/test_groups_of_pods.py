"""Groups of several pods: they are made, judged, counted and replaced as one. Two pods each unless said otherwise."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
from tests.operator.pods import NOW, at, owner, pod

from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_operator.desired.common import RenderSettings
from wherry_operator.desired.router import router_args
from wherry_operator.desired.runtime import Origin, engine_config, pod_template
from wherry_operator.desired.runtime import pod as pod_body
from wherry_operator.planning.causes import cause_of_group
from wherry_operator.planning.group import GroupView, group_views, ready_leaders
from wherry_operator.planning.groups import GroupPlan, plan_groups
from wherry_operator.planning.pods import ContainerState, PodView
from wherry_operator.planning.status import make_status
from wherry_operator.planning.types import Observed, Plan, Scale, Settings

LEADER = "10.0.0.1"


def member(group: str, index: int, revision: str = "new", **more: Any) -> PodView:
    """Pod number `index` of a group of two, ready unless told otherwise."""
    given: dict[str, Any] = {"index": index, "group_size": 2, "ip": LEADER if index == 0 else "10.0.0.2"} | more
    given.setdefault("leader", LEADER if index else "")
    return pod(f"chat-{group}-{index}", revision, **{"group": group} | given)


def group(name: str, revision: str = "new", **more: Any) -> list[PodView]:
    return [member(name, 0, revision, **more), member(name, 1, revision, **more)]


def crashed(restarts: int, message: str = "no such file", ran_s: float = 3, exited: float = 5) -> dict[str, Any]:
    """What a pod says whose container fell `restarts` times, the last time `exited` seconds ago."""
    state = ContainerState(
        "runtime", restarts, "CrashLoopBackOff", "back-off", 1, "Error", message, None, at(exited), ran_s
    )
    return {"ready": False, "restarts": restarts, "container": state}


@dataclass
class Case:
    name: str
    pods: list[PodView]
    replicas: int = 1
    creates: int = 0
    adds: list[str] = field(default_factory=list)
    deletes: list[str] = field(default_factory=list)
    pending: list[str] = field(default_factory=list)
    surge: int = 1


STARTING: dict[str, Any] = {"ready": False, "phase": "Pending"}

CASES = [
    Case("nothing yet: the leader comes first", [], 2, creates=2),
    Case("the leader has no address yet", [member("a", 0, ip="", **STARTING)], pending=["chat-a"]),
    Case("the others follow", [member("a", 0, **STARTING)], adds=["a/1 at 10.0.0.1"]),
    Case("it is whole", group("a")),
    Case("one rank is not ready: nothing to do but wait", [member("a", 0), member("a", 1, ready=False)]),
    Case("scale in counts groups", [*group("a", age=9), *group("b", age=5)], 1, deletes=["b"]),
    Case("a group half made goes before a whole one", [*group("a", age=5), member("b", 0, age=99)], 1, deletes=["b"]),
    Case("rollout", group("a", "old"), creates=1, pending=["chat-a"]),
    Case(
        "rollout waits for all ranks",
        [*group("a", "old"), member("b", 0), member("b", 1, ready=False)],
        pending=["chat-a"],
    ),
    Case("rollout ends when all are ready", [*group("a", "old"), *group("b")], deletes=["a"]),
    Case("an old group half made is not completed", [member("a", 0, "old", **STARTING)], creates=1, deletes=["a"]),
    # Lost as a whole.
    Case(
        "a rank was evicted",
        [member("a", 0), member("a", 1, phase="Failed", reason="Evicted")],
        creates=1,
        deletes=["a"],
    ),
    Case("a rank is gone", [member("a", 0)], creates=1, deletes=["a"]),
    Case("a rank is gone after a restart", [member("a", 0, ready=False, restarts=1)], creates=1, deletes=["a"]),
    Case("the leader is gone", [member("a", 1, ready=False)], creates=1, deletes=["a"]),
    Case("a rank is being deleted", [member("a", 0), member("a", 1, deleting=True)], creates=1, deletes=["a"]),
    Case("all of it is being deleted", group("a", deleting=True), creates=1),
    Case(
        "the node of a rank is lost",
        [member("a", 0), member("a", 1, lost_because="was lost with node n2")],
        creates=1,
        deletes=["a"],
    ),
    Case("the leader's address changed", [member("a", 0, ip="10.0.0.9"), member("a", 1)], creates=1, deletes=["a"]),
    # Restarts in place.
    Case("it may restart", [member("a", 0, **crashed(5)), member("a", 1, **crashed(5))]),
    Case("too often", [member("a", 0, **crashed(6)), member("a", 1, **crashed(6))], creates=1, deletes=["a"]),
    Case("ranks that fall together fall once", [member("a", 0, **crashed(4)), member("a", 1, **crashed(3))]),
    Case("often, but it works now", [member("a", 0, restarts=50), member("a", 1, restarts=50)]),
    Case(
        "often, but the last run was a long one",
        [member("a", 0, **crashed(60, ran_s=4000)), member("a", 1, **crashed(60, ran_s=4000))],
    ),
    Case(
        "a new one that fails as well has to wait",
        [member("a", 0, age=5, failures=1, **crashed(6)), member("a", 1, age=5, **crashed(6))],
        pending=["instead of chat-a"],
    ),
    Case(
        "until it is as old as the wait",
        [member("a", 0, age=11, failures=1, **crashed(6)), member("a", 1, age=11, **crashed(6))],
        creates=1,
        deletes=["a"],
    ),
]


def planned(pods: list[PodView], replicas: int = 1, surge: int = 1, **more: Any) -> GroupPlan:
    return plan_groups(tuple(pods), replicas, "new", surge, 0, NOW, **more)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_case(case: Case) -> None:
    plan = planned(case.pods, case.replicas, case.surge)
    assert len(plan.creations) == case.creates
    assert [f"{a.group.key}/{a.index} at {a.leader}" for a in plan.additions] == case.adds
    assert [deletion.group.key for deletion in plan.deletions] == case.deletes
    assert [entry.target for entry in plan.pending] == case.pending


def test_a_lost_node_takes_the_group_at_once_and_is_no_failure_of_it() -> None:
    lost = member("a", 1, failures=3, lost_because="was lost with node n2")
    plan = planned([member("a", 0, failures=3), lost])
    [creation], [deletion] = plan.creations, plan.deletions
    assert (creation.failures, creation.cause) == (3, "")
    assert not deletion.graceful
    assert creation.reason == "replaces chat-a: its pod chat-a-1 was lost with node n2"


@pytest.mark.parametrize(
    "pods, graceful",
    [
        ([member("a", 0), member("a", 1, deleting=True)], True),
        ([member("a", 0), member("a", 1, phase="Failed")], False),
        ([*group("a"), *group("b")], True),
        ([*group("a"), member("b", 0, **STARTING)], False),
    ],
    ids=["a rank is told to go", "a rank is gone", "one too many", "one too many that never served"],
)
def test_what_may_still_serve_is_drained(pods: list[PodView], graceful: bool) -> None:
    [deletion] = planned(pods).deletions
    assert deletion.graceful == graceful


def test_a_worn_out_group_leaves_its_cause_to_the_next() -> None:
    plan = planned(
        [member("a", 0, **crashed(6, "log\npeer lost: rank 1")), member("a", 1, **crashed(6, "log\nno GPU"))]
    )
    [creation] = plan.creations
    assert creation.failures == 1
    assert creation.cause == "chat-a-1 restarted 6 times, more than failover.maxGroupRestarts: no GPU"


class TestLeaving:
    def test_the_least_busy_goes_first(self) -> None:
        plan = planned([*group("a", age=5), *group("b", age=9)], busy={"a": 7, "b": 2})
        assert [deletion.group.key for deletion in plan.deletions] == ["b"]

    def test_what_drains_already_goes_on_draining(self) -> None:
        marked = [member("a", 0, drain=NOW), member("a", 1)]
        plan = planned([*marked, *group("b", age=9)], busy={"a": 7, "b": 2})
        assert [deletion.group.key for deletion in plan.deletions] == ["a"]

    def test_a_group_that_has_to_move_is_replaced_first(self) -> None:
        moving = {"a": "it is on node n1, which is being emptied"}
        first = planned(group("a"), moving=moving)
        assert [creation.reason for creation in first.creations] == ["takes over from chat-a"]
        assert not first.deletions
        then = planned([*group("a"), *group("b")], moving=moving)
        assert [d.reason for d in then.deletions] == ["it is on node n1, which is being emptied; others take over"]


class TestPlacesToAvoid:
    """A pod made in the place of one on a lost node keeps off it, until that is needed no more."""

    WAITS: ClassVar[dict[str, Any]] = {"node": "", "avoids": ("n1",), "unschedulable": "no room", **STARTING}

    @pytest.mark.parametrize(
        "age, nodes, made_anew",
        [
            (10, {}, False),
            (10, {"live_nodes": ["n1"]}, True),
            (70, {"lost_nodes": ["n1"]}, False),
            (70, {}, True),
        ],
        ids=["Kubernetes does not know yet", "it is back", "it is lost still", "nobody knows, but Kubernetes does"],
    )
    def test_case(self, age: float, nodes: dict[str, Any], made_anew: bool) -> None:
        waits = pod("a", age=age, **self.WAITS)
        plan = planned([waits], **nodes)
        assert (len(plan.creations), len(plan.deletions)) == ((1, 1) if made_anew else (0, 0))

    def test_it_is_looked_at_again_in_time(self) -> None:
        assert planned([pod("a", age=10, **self.WAITS)]).retry_after == 50

    def test_a_pod_that_found_a_place_stays(self) -> None:
        assert not planned([pod("a", age=70, avoids=("n1",))]).deletions


def test_only_leaders_of_groups_that_serve_are_asked_for_their_load() -> None:
    leaving = [member("d", index, deleting=True) for index in range(2)]
    pods = [*group("a"), member("b", 0), member("b", 1, ready=False), *group("c"), *leaving, pod("chat-e", "new")]
    assert [leader.name for leader in ready_leaders(pods)] == ["chat-a-0", "chat-c-0", "chat-e"]


class TestStatus:
    def status(self, *pods: PodView) -> Any:
        spec = {"parallelism": {"tensor": 2, "ranksPerPod": 1}}
        plan = Plan(Observed(owner(spec), pods), Scale(2), "new")
        return make_status(plan, Settings(), NOW)

    def test_replicas_are_groups(self) -> None:
        status = self.status(*group("a"), *group("b", "old"), member("c", 0, **STARTING))
        assert (status.replicas, status.ready_replicas, status.updated_replicas) == (3, 2, 2)

    def test_a_torn_group_does_not_count(self) -> None:
        status = self.status(*group("a"), member("b", 0), member("b", 1, phase="Failed", reason="Evicted"))
        assert (status.replicas, status.ready_replicas) == (1, 1)

    def test_the_pod_to_blame_is_named(self) -> None:
        blamed = member("a", 1, **crashed(2, "log\nno GPU"))
        [view] = group_views([member("a", 0, **crashed(2, "log\npeer lost: rank 1")), blamed])
        cause = cause_of_group(view, 5)
        assert cause is not None
        assert (cause.reason, cause.message) == ("CrashLoopBackOff", "pod chat-a-1, container runtime: no GPU")

    def test_degraded_outlives_the_group(self) -> None:
        status = self.status(member("b", 0, failed_before="chat-a-1 restarted 6 times: no GPU", **STARTING))
        degraded = next(c for c in status.conditions if c.type == "Degraded")
        assert (degraded.status, degraded.reason) == ("True", "RestartsExhausted")
        assert "chat-a-1 restarted 6 times: no GPU" in degraded.message


def test_an_operator_that_suspects_itself_says_so() -> None:
    plan = Plan(Observed(owner(), (pod("a"),), isolated="3 of 4 nodes look lost at once"), Scale(1), "new")
    degraded = next(c for c in make_status(plan, Settings(), NOW).conditions or [] if c.type == "Degraded")
    assert (degraded.status, degraded.reason) == ("True", "OperatorIsolated")


class TestManifest:
    def body(self, index: int = 0, origin: Origin | None = None, **spec: Any) -> dict[str, Any]:
        who = owner({"parallelism": {"tensor": 4, "ranksPerPod": 2}} | spec)
        assert who.spec is not None
        template = pod_template(who, who.spec, RenderSettings(), "token")
        return pod_body(who, template, "abcde", index, origin)

    def variables(self, body: dict[str, Any]) -> dict[str, Any]:
        env = body["spec"]["containers"][0]["env"]
        return {e["name"]: e.get("value") or e["valueFrom"].get("fieldRef", {}).get("fieldPath") for e in env}

    def test_every_pod_knows_its_group(self) -> None:
        told = self.variables(self.body(1, Origin(leader="10.0.0.1")))
        assert told["LWS_GROUP_SIZE"] == "2"
        assert told["LWS_LEADER_ADDRESS"] == "10.0.0.1"
        assert told["LWS_WORKER_INDEX"] == "metadata.labels['inference.wherry.dev/rank']"
        assert told["WHERRY_GROUP"] == "metadata.labels['inference.wherry.dev/group']"

    def test_the_leader_is_its_own(self) -> None:
        assert self.variables(self.body())["LWS_LEADER_ADDRESS"] == "status.podIP"

    def test_a_single_pod_has_no_place_in_a_group(self) -> None:
        told = self.variables(self.body(parallelism={"tensor": 2}))
        assert "WHERRY_GROUP" in told
        assert not any(name.startswith("LWS_") for name in told)

    def test_the_view_of_it(self) -> None:
        raw = self.body(1, Origin(leader="10.0.0.1", failures=2, cause="no GPU", avoid=("n1", "n2")))
        raw["metadata"] |= {"uid": "u", "creationTimestamp": "2026-01-01T00:00:00Z"}
        view = PodView.from_raw(raw)
        assert (view.index, view.group_size, view.leader, view.group) == (1, 2, "10.0.0.1", "abcde")
        assert (view.failures, view.failed_before, view.avoids) == (2, "no GPU", ("n1", "n2"))
        assert GroupView("abcde", (view,)).name == "chat-abcde"

    @pytest.mark.parametrize("given", [None, [{"matchExpressions": [1]}, {"matchExpressions": [2]}]])
    def test_every_way_to_place_it_keeps_off_lost_nodes(self, given: list[dict[str, Any]] | None) -> None:
        required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": given}}
        affinity: dict[str, Any] = {"affinity": {"nodeAffinity": required}} if given else {}
        body = self.body(origin=Origin(avoid=("n1", "n2")), **affinity)
        found = body["spec"]["affinity"]["nodeAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        fields = [{"key": "metadata.name", "operator": "NotIn", "values": [name]} for name in ("n1", "n2")]
        assert found["nodeSelectorTerms"] == [{**term, "matchFields": fields} for term in given or [{}]]

    def test_where_a_pod_keeps_off_is_no_part_of_its_revision(self) -> None:
        label = "inference.wherry.dev/revision"
        revisions = {self.body(i, o)["metadata"]["labels"][label] for i, o in [(0, None), (1, Origin(avoid=("n1",)))]}
        assert len(revisions) == 1

    def test_the_engine_is_told_of_its_ranks(self) -> None:
        model = {"name": "tiny", "uri": "sample://tiny"}
        many = LLMDeploymentSpec.model_validate({"model": model, "parallelism": {"tensor": 4, "ranksPerPod": 2}})
        assert (engine_config(many).tensor_parallel, engine_config(many).ranks_per_pod) == (4, 2)
        one = LLMDeploymentSpec.model_validate({"model": model})
        assert (engine_config(one).tensor_parallel, engine_config(one).ranks_per_pod) == (1, 0)


@pytest.mark.parametrize("resume", [True, False])
def test_the_router_is_told_whether_streams_go_on_elsewhere(resume: bool) -> None:
    who = owner({"failover": {"resume": resume}})
    assert who.spec is not None
    assert ("--no-resume" in router_args(who, who.spec)) != resume
