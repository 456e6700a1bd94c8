"""What a newer operator does to what runs: nothing. And what people change still rolls."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.operator.pods import NOW, owner, pod

from wherry_operator.api.resource import FINALIZER, LLMDeployment
from wherry_operator.desired import router as router_module
from wherry_operator.desired import runtime as runtime_module
from wherry_operator.desired.common import ANNOTATION_ROLLOUT, RenderSettings
from wherry_operator.planning.plan import make_plan
from wherry_operator.planning.revisions import KIND, choose
from wherry_operator.planning.types import Action, Observed, Plan, Scale, Settings
from wherry_protocol.naming import LABEL_REVISION

OLD, NEW = RenderSettings("runtime:1", "router:1"), RenderSettings("runtime:2", "router:2")
BEFORE = Path(__file__).parent / "before" / "revisions.yaml"


def newer_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    """From here on templates are made as by a later version: other values in both of them."""
    monkeypatch.setattr(runtime_module, "NODE_LOST_SECONDS", 77)
    monkeypatch.setattr(router_module, "LINGER_S", 77)


class Cluster:
    """What an operator made, as the API server would keep it."""

    def __init__(self) -> None:
        self.objects: dict[tuple[str, str], dict[str, Any]] = {}
        self.pods: dict[str, dict[str, Any]] = {}
        self.token: str | None = None
        self.status: dict[str, Any] = {}
        self._groups = iter(f"g{i}" for i in range(1000))

    def look(self, who: LLMDeployment, images: RenderSettings) -> Plan:
        """One pass of an operator, carried out."""
        views = tuple(pod(n, p["metadata"]["labels"][LABEL_REVISION]) for n, p in self.pods.items())
        observed = Observed(who, views, objects=dict(self.objects), token=self.token, leaving_nodes={})
        plan = make_plan(observed, Scale(2), Settings(images), NOW, "token", lambda: next(self._groups))
        for action in plan.actions:
            self._do(action)
        self.token, self.status = "token", {"revision": plan.revision, "observedGeneration": who.generation}
        return plan

    def settle(self, who: LLMDeployment, images: RenderSettings) -> None:
        for _ in range(10):
            if self.look(who, images).settled:
                return
        raise AssertionError("it does not settle")

    def _do(self, action: Action) -> None:
        where: dict[Any, dict[str, Any]] = self.pods if action.kind == "Pod" else self.objects
        key: Any = action.name if action.kind == "Pod" else (action.kind, action.name)
        if action.verb == "delete":
            del where[key]
        elif action.verb in ("create", "apply"):
            body = action.body or {}
            where[key] = body | {"metadata": body["metadata"] | {"uid": f"uid-{key}"}}

    @property
    def router(self) -> dict[str, Any]:
        return dict(self.objects["Deployment", "chat-router"]["spec"]["template"])

    @property
    def records(self) -> list[str]:
        return sorted(name for kind, name in self.objects if kind == KIND)


@pytest.fixture
def cluster() -> Cluster:
    cluster = Cluster()
    cluster.settle(owner(), OLD)
    return cluster


@dataclass
class Edit:
    name: str
    spec: dict[str, Any] = field(default_factory=dict)
    annotations: dict[str, str] = field(default_factory=dict)
    runtime: bool = False
    router: bool = False


EDITS = [
    Edit("nothing"),
    Edit("a new field that is at its default", {"rolloutStrategy": {"maxUnavailable": 0}}),
    Edit("how many replicas run", {"replicas": 2}),
    Edit("how many routers run", {"router": {"replicas": 2}}),
    Edit("how it is rolled out", {"rolloutStrategy": {"maxUnavailable": 1}}),
    Edit("the router's memory", {"router": {"resources": {"limits": {"memory": "1Gi"}}}}, router=True),
    Edit("the runtime's memory", {"resources": {"limits": {"memory": "1Gi"}}}, runtime=True),
    Edit("how long a drain takes", {"rolloutStrategy": {"drainTimeout": "1m"}}, runtime=True, router=True),
    Edit("an annotation of someone else", annotations={"example.com/note": "x"}),
    Edit("the wish for new pods", annotations={ANNOTATION_ROLLOUT: "1"}, runtime=True, router=True),
]


@pytest.mark.parametrize("upgraded", [False, True], ids=["same operator", "newer operator"])
@pytest.mark.parametrize("edit", EDITS, ids=lambda edit: edit.name)
def test_only_what_people_change_rolls(
    edit: Edit, upgraded: bool, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, router = dict(cluster.pods), cluster.router
    if upgraded:
        newer_operator(monkeypatch)
    cluster.settle(owner(edit.spec, annotations=edit.annotations, generation=4), NEW if upgraded else OLD)
    assert (cluster.pods != before) == edit.runtime
    # A newer operator's router comes along when the runtime changes.
    assert (cluster.router != router) == (edit.router or (upgraded and edit.runtime))
    assert len(cluster.records) == 1


def test_pods_that_come_later_are_made_alike(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    newer_operator(monkeypatch)
    lost, kept = cluster.pods
    del cluster.pods[lost]
    cluster.settle(owner(), NEW)
    [new] = set(cluster.pods) - {kept}
    assert cluster.pods[new]["spec"] == cluster.pods[kept]["spec"]
    assert cluster.pods[new]["spec"]["containers"][0]["image"] == "runtime:1"


def test_a_change_brings_all_that_is_new(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    newer_operator(monkeypatch)
    cluster.settle(owner({"batching": {"maxRunning": 8}}, generation=4), NEW)
    assert {p["spec"]["containers"][0]["image"] for p in cluster.pods.values()} == {"runtime:2"}
    assert cluster.router["spec"]["containers"][0]["image"] == "router:2"
    assert "77" in str(cluster.router["spec"]["containers"][0]["args"])


def test_an_edit_reverted_midway_finds_its_revision(cluster: Cluster, monkeypatch: pytest.MonkeyPatch) -> None:
    newer_operator(monkeypatch)
    first = dict(cluster.pods)
    cluster.look(owner({"batching": {"maxRunning": 8}}, generation=4), NEW)
    assert len(cluster.records) == 2, "the one of the pods that still run is kept"
    assert set(first) < set(cluster.pods)
    cluster.settle(owner(generation=5), NEW)
    assert cluster.pods == first
    assert len(cluster.records) == 1


def test_a_new_token_rolls_everything(cluster: Cluster) -> None:
    before, router = set(cluster.pods), cluster.router
    cluster.token = "another"
    for _ in range(10):
        cluster.token = "another"
        cluster.look(owner(), OLD)
    assert not before & set(cluster.pods)
    assert cluster.router != router


def test_a_record_that_cannot_be_read_is_no_record(cluster: Cluster) -> None:
    [name] = cluster.records
    for data in (None, {}, {"asked": 1, "made": {}}, {"asked": {}, "made": {"revision": 1}}):
        cluster.objects[KIND, name] = cluster.objects[KIND, name] | {"data": data}
        observed = Observed(owner(), objects=dict(cluster.objects), token="token")
        assert [action.verb for action in choose(observed, OLD, "token").actions] == ["create"]


def test_a_spec_that_means_nothing_any_more_gives_way(cluster: Cluster) -> None:
    [name] = cluster.records
    raw = cluster.objects[KIND, name]
    asked = raw["data"]["asked"] | {"spec": {"model": "what once was text"}}
    cluster.objects[KIND, name] = raw | {"data": raw["data"] | {"asked": asked}}
    cluster.settle(owner(), OLD)
    assert len(cluster.records) == 1


# Objects as an operator rendered them that kept no records and knew no readiness gates.
def before_records() -> tuple[dict[tuple[str, str], dict[str, Any]], str]:
    documents = list(yaml.safe_load_all(BEFORE.read_text()))
    objects = {
        (d["kind"], d["metadata"]["name"]): d | {"metadata": d["metadata"] | {"uid": "u"}}
        for d in documents
        if d["kind"] != "Pod"
    }
    [made] = [d for d in documents if d["kind"] == "Pod"]
    return objects, made["metadata"]["labels"][LABEL_REVISION]


def look_at_old(change: Callable[[dict[str, Any]], Any] | None = None) -> tuple[Plan, dict[str, Any]]:
    objects, revision = before_records()
    metadata = {"uid": "00000000-0000-0000-0000-000000000000", "finalizers": [FINALIZER]}
    spec = {"batching": {"kvCacheMemory": "128Mi"}, "replicas": 2}
    spec["resources"] = {"requests": {"cpu": "200m", "memory": "768Mi"}, "limits": {"memory": "1Gi"}}
    given = metadata | {"status": {"revision": revision, "observedGeneration": 3}}
    if change:
        change(given)
    pods = (pod("a", revision), pod("b", revision))
    observed = Observed(owner(spec, **given), pods, objects=objects, token="token", leaving_nodes={})
    plan = make_plan(observed, Scale(2), Settings(NEW), NOW, "x", lambda: "new")
    return plan, objects["Deployment", "chat-router"]["spec"]["template"]


def test_what_ran_before_there_were_records_is_adopted() -> None:
    plan, router = look_at_old()
    assert [a for a in plan.actions if a.kind == "Pod"] == []
    assert not plan.pending
    applied = [a.body for a in plan.actions if a.kind == "Deployment" and a.body]
    assert [body["spec"]["template"] for body in applied] == [router], "the router would be rolled"
    [record] = [a for a in plan.actions if a.kind == KIND]
    assert record.body
    assert record.body["data"]["made"]["revision"] == plan.revision == before_records()[1]


def test_what_was_edited_while_no_operator_looked_is_not() -> None:
    plan, _ = look_at_old(lambda given: given.update(generation=4))
    assert any(a.kind == "Pod" and a.verb == "create" for a in plan.actions)
    assert plan.revision != before_records()[1]
