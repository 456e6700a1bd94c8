"""The planner: an exact snapshot and the time in, a plan out. Pure; `wherry plan` and the operator run this same code.

Level-triggered: nothing is remembered between plans, so it does not matter what happened, only what is.
"""

from collections.abc import Callable
from datetime import datetime

from wherry_operator.api.resource import FINALIZER, InvalidSpecError
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec, PendingAction
from wherry_operator.desired.objects import Desired, render
from wherry_operator.desired.runtime import Origin, drain_seconds, pod
from wherry_operator.planning.draining import plan_drains
from wherry_operator.planning.failover import lost_routers
from wherry_operator.planning.group import GroupView, group_views
from wherry_operator.planning.groups import GroupPlan, bounds, plan_groups
from wherry_operator.planning.leaving import moving
from wherry_operator.planning.objects import name_conflict, object_actions, owned, teardown_actions
from wherry_operator.planning.revisions import choose
from wherry_operator.planning.routers import Routers, plan_gates, routers_of
from wherry_operator.planning.types import Action, Observed, Plan, Problem, Scale, Settings


def make_plan(
    observed: Observed, scale: Scale, settings: Settings, now: datetime, new_token: str, new_group: Callable[[], str]
) -> Plan:
    """What to do about one LLMDeployment.

    Args:
        observed: the snapshot.
        scale: how many replicas should run.
        settings: the operator's.
        now: the time, UTC.
        new_token: the worker token to use where there is none yet.
        new_group: makes the id of a new group.
    """
    owner = observed.owner
    if owner.deleting:
        return _teardown(observed, scale)
    try:
        token, moves = observed.token or new_token, observed.leaving_nodes is not None
        choice = choose(observed, settings.render, token)
        desired = render(owner, settings.render, token, scale.replicas, moves=moves, kept=choice.templates)
    except InvalidSpecError as error:
        return Plan(observed, scale, problem=Problem("InvalidSpec", str(error)))
    spec = owner.spec
    if spec is None:
        raise TypeError("a spec that rendered cannot be missing")
    if problem := name_conflict(desired, observed):
        return Plan(observed, scale, desired.revision, problem=problem)
    actions = []
    if FINALIZER not in owner.finalizers:
        # Before anything else, so that nothing is ever made that deletion would not take down in order.
        reason = "so that deletion lets running requests finish"
        finalizers = (*owner.finalizers, FINALIZER)
        actions.append(Action("finalizers", "LLMDeployment", owner.name, reason, uid=owner.uid, finalizers=finalizers))
    # What pods are made from is written down before any is made from it.
    actions += [*choice.actions, *object_actions(desired, observed)]
    return _with_groups(observed, scale, desired, spec, actions, now, new_group)


def _with_groups(
    observed: Observed,
    scale: Scale,
    desired: Desired,
    spec: LLMDeploymentSpec,
    actions: list[Action],
    now: datetime,
    new_group: Callable[[], str],
) -> Plan:
    views = group_views(observed.pods)
    routers = routers_of(observed)
    groups = _plan_groups(observed, scale, desired.revision, spec, views, routers, now)
    for creation in groups.creations:
        origin = Origin(
            failures=creation.failures, cause=creation.cause, avoid=observed.shunned_nodes, revision=desired.revision
        )
        body = pod(observed.owner, desired.template, new_group(), origin=origin)
        actions.append(Action("create", "Pod", body["metadata"]["name"], creation.reason, body=body))
    for addition in groups.additions:
        origin = Origin(leader=addition.leader, avoid=observed.shunned_nodes, revision=desired.revision)
        body = pod(observed.owner, desired.template, addition.group.key, addition.index, origin)
        actions.append(Action("create", "Pod", body["metadata"]["name"], addition.reason, body=body))
    gates = plan_gates(views, routers, now)
    drains = plan_drains(groups.deletions, views, routers, now, drain_seconds(spec))
    pending = (*groups.pending, *gates.pending, *drains.pending)
    waits = [part.retry_after for part in (groups, gates, drains) if part.retry_after is not None]
    actions += [*gates.actions, *drains.actions, *lost_routers(observed)]
    return Plan(observed, scale, desired.revision, tuple(actions), pending, retry_after=min(waits, default=None))


def _plan_groups(
    observed: Observed,
    scale: Scale,
    revision: str,
    spec: LLMDeploymentSpec,
    views: tuple[GroupView, ...],
    routers: Routers,
    now: datetime,
) -> GroupPlan:
    strategy = spec.rollout_strategy
    surge, unavailable = bounds(strategy.max_surge, strategy.max_unavailable, scale.replicas)
    return plan_groups(
        observed.pods,
        scale.replicas,
        revision,
        surge,
        unavailable,
        now,
        max_restarts=spec.failover.max_group_restarts,
        lost_nodes=observed.shunned_nodes,
        live_nodes=observed.open_nodes,
        busy={group.key: routers.about(group).in_flight for group in views},
        moving=moving(views, observed.leaving_nodes or {}),
    )


def _teardown(observed: Observed, scale: Scale) -> Plan:
    """Pods first: they finish what they have begun while the router still stands; then all else; then the finalizer."""
    owner = observed.owner
    if FINALIZER not in owner.finalizers:
        return Plan(observed, scale)
    reason = "the LLMDeployment is being deleted"
    # A lost node may never say that its pods are gone. They are told to go, so it ends them if it comes back.
    if left := [p for p in observed.pods if not (p.deleting and p.lost)]:
        actions = [Action("delete", "Pod", p.name, reason, uid=p.uid) for p in left if not p.deleting]
        pending = [
            PendingAction(action="Wait", target=p.name, reason=f"it finishes its requests on {p.node or 'no node'}")
            for p in sorted(left, key=lambda p: p.name)
        ]
        return Plan(observed, scale, actions=tuple(actions), pending=tuple(pending))
    if any(owned(raw, owner) for raw in observed.objects.values()):
        wait = PendingAction(action="Wait", target="the router's objects", reason="they are being deleted")
        return Plan(observed, scale, actions=tuple(teardown_actions(observed)), pending=(wait,), retry_after=1.0)
    others = tuple(finalizer for finalizer in owner.finalizers if finalizer != FINALIZER)
    done = Action("finalizers", "LLMDeployment", owner.name, "everything is gone", uid=owner.uid, finalizers=others)
    return Plan(observed, scale, actions=(done,))
