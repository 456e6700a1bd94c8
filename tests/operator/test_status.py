"""Plan and status from snapshots: what is done first, what is said, and that saying it again changes nothing."""

from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from tests.operator.pods import NOW, at, failed, loading, owner, pending, pod

from wherry_operator.api.resource import FINALIZER
from wherry_operator.desired.common import RenderSettings
from wherry_operator.desired.objects import render
from wherry_operator.desired.runtime import engine_config
from wherry_operator.planning.objects import difference, object_actions
from wherry_operator.planning.plan import make_plan
from wherry_operator.planning.pods import ContainerState, PodView, Quality
from wherry_operator.planning.quality import quality_of
from wherry_operator.planning.revisions import choose
from wherry_operator.planning.status import make_status
from wherry_operator.planning.types import Observed, Plan, Refusal, Scale, Settings
from wherry_protocol.engine_config import to_args

SETTINGS = Settings(RenderSettings("runtime:1", "router:1"))
REVISION = render(owner(), SETTINGS.render, "token").revision


def existing(who: Any = None, replicas: int = 2, **router_status: Any) -> dict[tuple[str, str], dict[str, Any]]:
    """Every child but the pods, as the API server would have it."""
    who = who or owner()
    desired = render(who, SETTINGS.render, "token", replicas)
    [record] = choose(Observed(who), SETTINGS.render, "token").actions
    bodies = (*desired.applied, desired.secret, record.body or {})
    objects = {(b["kind"], b["metadata"]["name"]): dict(b) for b in bodies}
    objects["Deployment", "chat-router"]["status"] = router_status or {"readyReplicas": 1}
    for (kind, name), raw in objects.items():
        raw["metadata"] = {**raw["metadata"], "uid": f"uid-{kind}-{name}"}
    return objects


def observed(*pods: PodView, who: Any = None, **more: Any) -> Observed:
    who = who or owner()
    objects = more.pop("objects") if "objects" in more else existing(who)
    current = tuple(replace(p, revision=REVISION) if p.revision == "new" else p for p in pods)
    return Observed(who, current, objects=objects, **({"token": "token", "leaving_nodes": {}} | more))


def plan(snapshot: Observed, scale: Scale | int = 2) -> Plan:
    wanted = Scale(scale) if isinstance(scale, int) else scale
    ids = iter("abcdefgh")
    return make_plan(snapshot, wanted, SETTINGS, NOW, "new-token", lambda: next(ids))


def conditions(snapshot: Observed, scale: Scale | int = 2, *refusals: Refusal) -> dict[str, tuple[str, str, str]]:
    status = make_status(plan(snapshot, scale), SETTINGS, NOW, refusals)
    return {c.type: (c.status, c.reason, c.message) for c in status.conditions or []}


def steps(made: Plan) -> list[str]:
    return [f"{action.verb} {action.kind} {action.name}" for action in made.actions]


def test_the_first_plan_marks_the_object_before_it_makes_anything() -> None:
    made = plan(Observed(owner(finalizers=["other"])))
    first, record, *rest = steps(made)
    assert (first, record.rpartition("-")[0]) == ("finalizers LLMDeployment chat", "create ControllerRevision chat")
    assert rest == [
        "create Secret chat-worker-token",
        "apply PodDisruptionBudget chat",
        "apply ServiceAccount chat-router",
        "apply Role chat-router",
        "apply RoleBinding chat-router",
        "apply Service chat",
        "apply Deployment chat-router",
        "create Pod chat-a-0",
        "create Pod chat-b-0",
    ]
    assert made.actions[0].finalizers == ("other", FINALIZER)
    assert "new-token" not in repr(made), "a plan must not show the token"


def test_nothing_to_do() -> None:
    made = plan(observed(pod("a"), pod("b")))
    assert made.settled
    assert conditions(observed(pod("a"), pod("b")))["Ready"] == (
        "True",
        "AllReplicasReady",
        "2 of 2 replicas answer requests",
    )


BACKOFF = ContainerState("runtime", 3, "CrashLoopBackOff", "back-off", 1, "Error", "log\nno such model: /models/x")
IMAGE = ContainerState("runtime", 0, "ErrImagePull", "x:1: not found")
ROUTER_DOWN = {"objects": existing(readyReplicas=0)}


@pytest.mark.parametrize(
    "pods, more, scale, expected",
    [
        (
            [],
            {},
            2,
            {"Ready": "Scaling", "Progressing": "Scaling", "ModelLoaded": "NoReplicas"},
        ),
        ([pending("a"), pod("b")], {}, 2, {"Ready": "Scheduling", "Available": "Serving", "Progressing": "Starting"}),
        ([loading("a"), loading("b")], {}, 2, {"Ready": "Loading", "Available": "Loading", "ModelLoaded": "Loading"}),
        ([pod("a", "old"), pod("b", "old")], {}, 2, {"Ready": "RollingUpdate", "Available": "Serving"}),
        (
            [pod("a"), pod("b")],
            ROUTER_DOWN,
            2,
            {"Ready": "Starting", "RouterReady": "Starting"},
        ),
        ([], {}, 0, {"Ready": "Stopped", "Available": "Stopped", "ModelLoaded": "Stopped", "Degraded": "AsExpected"}),
        (
            [pod("a"), loading("b", container=BACKOFF)],
            {},
            2,
            {
                "Ready": "CrashLoopBackOff",
                "Available": "Serving",
                "Degraded": "CrashLoopBackOff",
                "ModelLoaded": "Loaded",
            },
        ),
        ([pending("a", container=IMAGE, node="n")], {}, 1, {"Ready": "ImagePullFailed", "Degraded": "ImagePullFailed"}),
        # An error is named before a lack of room, and that before waiting.
        (
            [pending("a", unschedulable="no room"), pending("b", container=IMAGE, node="n"), loading("c")],
            {},
            3,
            {"Degraded": "ImagePullFailed", "InsufficientCapacity": "Unschedulable"},
        ),
        ([failed("a", failures=3), pod("b")], {}, 2, {"Degraded": "Evicted", "Available": "Serving"}),
        # Trouble of old pods that are about to go is not shown as that of the new ones.
        (
            [pod("a", "old"), loading("b", "old", container=BACKOFF), loading("c")],
            {},
            2,
            {"Degraded": "AsExpected"},
        ),
        (
            [pod("a"), pod("b")],
            {"router_pods": (pending("r", container=IMAGE, node="n"),), **ROUTER_DOWN},
            2,
            {"RouterReady": "ImagePullFailed", "Degraded": "RouterFailing", "Ready": "ImagePullFailed"},
        ),
    ],
)
def test_reasons(pods: list[PodView], more: dict[str, Any], scale: int, expected: dict[str, str]) -> None:
    found = conditions(observed(*pods, **more), scale)
    assert {kind: found[kind][1] for kind in expected} == expected


def test_the_message_is_the_runtimes_own_last_word() -> None:
    found = conditions(observed(loading("a", container=BACKOFF), loading("b", container=BACKOFF)))
    assert found["Degraded"][2] == "pod a, container runtime: no such model: /models/x (and 1 more pod)"


def test_refusals_read_the_same_at_every_try() -> None:
    snapshot = observed(pod("a"))

    def told(group: str) -> tuple[str, str, str]:
        made = make_plan(snapshot, Scale(2), SETTINGS, NOW, "t", lambda: group)
        message = f'pods "{made.actions[-1].name}" is forbidden: exceeded quota: small'
        status = make_status(made, SETTINGS, NOW, [Refusal(made.actions[-1], 403, message)])
        [capacity] = [c for c in status.conditions or [] if c.type == "InsufficientCapacity"]
        return capacity.status, capacity.reason, capacity.message

    assert told("x1") == told("x2")
    assert told("x1")[:2] == ("True", "QuotaExceeded")


def test_an_unusable_spec_leaves_the_pods_alone() -> None:
    bad = owner({"podTemplate": {"spec": {"containers": [{"image": "x"}]}}})
    made = plan(observed(pod("a"), who=bad, objects={}))
    assert not made.actions
    found = conditions(observed(pod("a"), who=bad, objects={}))
    assert found["Degraded"][1] == "InvalidSpec"
    assert "podTemplate.spec.containers[0] needs 'name'" in found["Degraded"][2]


def test_a_spec_that_the_types_refuse_becomes_a_condition() -> None:
    bad = owner({"replicas": "many"})
    assert "spec.replicas" in conditions(observed(who=bad, objects={}))["Degraded"][2]


def test_transition_times_move_only_with_the_status() -> None:
    first = make_status(plan(observed(loading("a"))), SETTINGS, at(60)).to_wire()
    before = {c["type"]: c for c in first["conditions"]}
    second = make_status(plan(observed(pod("a"), pod("b"), who=owner(status=first))), SETTINGS, NOW).to_wire()
    after = {c["type"]: c for c in second["conditions"]}
    for kind in after:
        moved = before[kind]["status"] != after[kind]["status"]
        assert (before[kind]["lastTransitionTime"] != after[kind]["lastTransitionTime"]) == moved, kind
    again = make_status(
        plan(observed(pod("a"), pod("b"), who=owner(status=second))), SETTINGS, NOW + timedelta(hours=1)
    ).to_wire()
    assert again == second


def test_long_messages_are_cut() -> None:
    found = conditions(observed(pending("a", unschedulable="x" * 5000)))
    assert len(found["InsufficientCapacity"][2]) == 1024


def test_scaling_is_told_only_where_it_is_on() -> None:
    assert "ScalingActive" not in conditions(observed(pod("a"), pod("b")))
    found = conditions(observed(pod("a"), pod("b")), Scale(2, "NoSignals", "nobody answers", active=False))
    assert found["ScalingActive"] == ("False", "NoSignals", "nobody answers")


@pytest.mark.parametrize(
    "service_url, expected", [("dns", "http://chat.default.svc:8000"), ("ip", "http://10.0.0.7:8000")]
)
def test_url(service_url: Any, expected: str) -> None:
    snapshot = observed(pod("a"))
    snapshot.objects["Service", "chat"]["spec"] = {"clusterIP": "10.0.0.7"}
    status = make_status(plan(snapshot), replace(SETTINGS, service_url=service_url), NOW)
    assert status.url == expected


def deleting(*pods: PodView, objects: Any = None, finalizers: Any = (FINALIZER,)) -> Observed:
    who = replace(owner(finalizers=list(finalizers)), deleting=True)
    return observed(*pods, who=who, objects=existing() if objects is None else objects)


def test_deletion_in_order() -> None:
    first = plan(deleting(pod("a"), pod("b", deleting=True)))
    assert steps(first) == ["delete Pod a"]
    assert [(entry.action, entry.target) for entry in first.pending] == [("Wait", "a"), ("Wait", "b")]
    second = steps(plan(deleting()))
    assert second[:2] == ["delete PodDisruptionBudget chat", "delete Deployment chat-router"]
    assert len(second) == 8
    last = plan(deleting(objects={}, finalizers=["other", FINALIZER]))
    assert steps(last) == ["finalizers LLMDeployment chat"]
    assert last.actions[0].finalizers == ("other",)
    assert not plan(deleting(pod("a"), finalizers=["other"])).actions
    assert conditions(deleting(pod("a")))["Ready"][1] == "Terminating"


def test_deletion_leaves_what_is_not_ours() -> None:
    objects = existing()
    objects["Service", "chat"]["metadata"]["ownerReferences"] = []
    assert "delete Service chat" not in steps(plan(deleting(objects=objects)))


@pytest.mark.parametrize(
    "change, path",
    [
        ({}, ""),
        ({"spec": {"defaulted": True}}, ""),
        ({"spec": {"replicas": 7}}, ".spec.replicas was changed by someone else"),
        ({"metadata": {"annotations": {}}}, "what is wanted of it changed"),
        ({"metadata": {"labels": {}}}, ".metadata.labels.app.kubernetes.io/name was changed by someone else"),
    ],
)
def test_difference(change: dict[str, Any], path: str) -> None:
    wanted = render(owner(), SETTINGS.render, "token").applied[-1]
    raw = {**wanted, **{key: {**wanted[key], **value} for key, value in change.items()}}
    assert difference(wanted, raw) == path


def test_quantities_that_the_api_server_rewrites_are_no_difference() -> None:
    who = owner({"router": {"resources": {"limits": {"cpu": "1000m", "memory": "1024Mi"}}}})
    snapshot = observed(who=who)
    desired = render(who, SETTINGS.render, "token", 2)
    [container] = snapshot.objects["Deployment", "chat-router"]["spec"]["template"]["spec"]["containers"]
    container["resources"] = {"limits": {"cpu": "1", "memory": "1Gi"}}
    assert object_actions(desired, snapshot) == []


def test_a_new_token_rolls_every_pod() -> None:
    one, two = (render(owner(), SETTINGS.render, token) for token in ("one", "two"))
    assert one.revision != two.revision
    assert one.applied[-1]["spec"]["template"] != two.applied[-1]["spec"]["template"]


MEASURED = Quality("int4", divergence=0.0009257, change=0.00634, tokens=255)
FIGURES = {"divergence": "0.000926", "perplexityChange": "+0.63%", "tokens": 255}
WORDS = "0.0009 nats per token from the model as it was, over 255 tokens of a built-in text"
BEFORE = {"method": "int4", "revision": REVISION, "divergence": "0.5", "tokens": 7, "message": "told before"}
QUALITIES: dict[str, tuple[str, list[Quality | None], dict[str, Any] | None, dict[str, Any] | None]] = {
    "nothing is rounded": ("none", [MEASURED], BEFORE, None),
    "nobody has told yet": ("int4", [None, None], None, {"message": "not measured yet"}),
    "one has": ("int4", [None, MEASURED], None, {**FIGURES, "message": WORDS}),
    "one could not, and one could": (
        "int4",
        [Quality("int4", error="no"), MEASURED],
        None,
        {**FIGURES, "message": WORDS},
    ),
    "it could not be measured": (
        "int4",
        [Quality("int4", error="why " * 99)],
        None,
        {"message": f"not measured: {'why ' * 50}"},
    ),
    "the operator has just started": ("int4", [None], BEFORE, BEFORE),
    "it was told of other pods": ("int4", [None], {**BEFORE, "revision": "old"}, {"message": "not measured yet"}),
}


@pytest.mark.parametrize("case", QUALITIES)
def test_what_rounding_costs(case: str) -> None:
    method, qualities, before, expected = QUALITIES[case]
    who = owner({"quantization": {"method": method}}, status={"quantization": before} if before else {})
    revision = render(who, SETTINGS.render, "token").revision
    if before is not None and before["revision"] == REVISION:
        before = who.status["quantization"] = {**before, "revision": revision}
        expected = before if expected is BEFORE else expected
    pods = [pod(f"p{i}", revision=revision, quality=quality) for i, quality in enumerate(qualities)]
    found = make_status(plan(observed(*pods, who=who)), SETTINGS, NOW).to_wire().get("quantization")
    if expected is None:
        assert found is None
    else:
        assert found == {"method": method, "revision": revision, **expected}


def test_what_is_not_to_be_measured_is_not_waited_for() -> None:
    """The workers are told, and the status says so, whatever older pods had told."""
    who = owner({"quantization": {"method": "int4", "measure": False}})
    rendered = render(who, SETTINGS.render, "token")
    measured = pod("p", revision=rendered.revision, quality=Quality("int4", 0.5, 0.1, 9))
    found = make_status(plan(observed(measured, who=who)), SETTINGS, NOW).to_wire()["quantization"]
    told = "not measured: spec.quantization.measure is false"
    assert found == {"method": "int4", "revision": rendered.revision, "message": told}
    assert who.spec is not None
    assert "--measure-quality=false" in to_args(engine_config(who.spec))
    asked = owner({"quantization": {"method": "int4"}}).spec
    assert asked is not None
    assert not [argument for argument in to_args(engine_config(asked)) if "measure" in argument]


@pytest.mark.parametrize(
    ("health", "found"),
    [
        (
            b'{"state":"ready","quality":{"method":"int4","divergence":0.5,"change":0.1,"tokens":9}}',
            Quality("int4", 0.5, 0.1, 9),
        ),
        (b'{"quality":{"method":"int8","error":"no"}}', Quality("int8", error="no")),
        (b'{"state":"ready"}', None),
        (b'{"quality":{"method":7}}', None),
        (b"<html>", None),
    ],
)
def test_what_a_worker_says_of_its_quality(health: bytes, found: Quality | None) -> None:
    assert quality_of(health) == found
