"""A plan and what became of it → the status to write. Pure. The phase follows from conditions and decides nothing."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from wherry_operator.api import conditions as c
from wherry_operator.api.conditions import Finding, dated
from wherry_operator.api.v1alpha1 import LLMDeploymentStatus, OperatorInfo, PendingAction, QuantizationStatus
from wherry_operator.desired.common import router_name, selector_text
from wherry_operator.planning.causes import Cause, worst, worst_of_groups
from wherry_operator.planning.group import GroupView, group_views
from wherry_operator.planning.groups import DEFAULT_MAX_RESTARTS
from wherry_operator.planning.quality import quantization_status
from wherry_operator.planning.types import Observed, Plan, Refusal, Settings
from wherry_protocol import naming


def make_status(plan: Plan, settings: Settings, now: datetime, refusals: Sequence[Refusal] = ()) -> LLMDeploymentStatus:
    """The status after `plan` was carried out as far as `refusals` allowed."""
    owner = plan.observed.owner
    groups = [group for group in group_views(plan.observed.pods) if not group.deleting]
    nodes = plan.observed.shunned_nodes, plan.observed.open_nodes
    alive = [group for group in groups if group.loss(_most_restarts(plan), *nodes, now) is None]
    findings = [] if owner.deleting else _findings(plan, groups, alive, refusals)
    if owner.deleting:
        findings = _terminating(plan)
    previous = owner.status.get("conditions") or []
    text = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    pending = [*plan.pending, *(_refused(refusal) for refusal in refusals)]
    return LLMDeploymentStatus(
        phase=_phase(plan, findings),
        observed_generation=owner.generation,
        desired_replicas=0 if owner.deleting else plan.scale.replicas,
        replicas=len(alive),
        ready_replicas=sum(group.ready for group in alive),
        updated_replicas=sum(group.revision == plan.revision for group in alive),
        revision=plan.revision or owner.status.get("revision"),
        selector=selector_text(owner),
        url=_url(plan.observed, settings),
        operator=OperatorInfo(
            version=settings.version,
            runtime_image=settings.render.runtime_image,
            router_image=settings.render.router_image,
            sees_nodes=plan.observed.leaving_nodes is not None,
        ),
        quantization=_quantization(plan),
        plan=pending or None,
        conditions=dated(findings, previous, text, owner.generation),
    )


def _quantization(plan: Plan) -> QuantizationStatus | None:
    spec, before = plan.observed.owner.spec, plan.observed.owner.status
    if spec is None:
        return None
    return quantization_status(plan.observed.pods, plan.revision or "", spec.quantization, before.get("quantization"))


def _most_restarts(plan: Plan) -> int:
    spec = plan.observed.owner.spec
    return spec.failover.max_group_restarts if spec else DEFAULT_MAX_RESTARTS


def _url(observed: Observed, settings: Settings) -> str | None:
    owner = observed.owner
    service = observed.objects.get(("Service", owner.name))
    scheme = "https" if owner.spec and owner.spec.router.tls else "http"
    if settings.service_url == "dns":
        return f"{scheme}://{owner.name}.{owner.namespace}.svc:{naming.SERVICE_PORT}"
    address = (service or {}).get("spec", {}).get("clusterIP")
    return f"{scheme}://{address}:{naming.SERVICE_PORT}" if address else None


def _refused(refusal: Refusal) -> PendingAction:
    verb = {"create": "Create", "apply": "Apply", "delete": "Delete"}.get(refusal.action.verb, "Change")
    target = refusal.action.kind if refusal.action.kind == "Pod" else f"{refusal.action.kind} {refusal.action.name}"
    return PendingAction(action=f"{verb}{refusal.action.kind}", target=target, reason=_refusal_text(refusal))


def _refusal_text(refusal: Refusal) -> str:
    # A pod's name is new at every try; without it the same refusal reads the same.
    return refusal.message.replace(refusal.action.name, "…") if refusal.action.kind == "Pod" else refusal.message


def _refusal_cause(refusal: Refusal) -> Cause:
    text = f"the API server refused to {refusal.action.verb} a {refusal.action.kind}: {_refusal_text(refusal)}"
    if refusal.code == 403 and "quota" in refusal.message:
        return Cause("QuotaExceeded", text, "capacity")
    if refusal.code == 403:
        return Cause("Forbidden", text)
    return Cause("InvalidPod" if refusal.action.kind == "Pod" else "InvalidObject", text)


def _findings(
    plan: Plan, groups: list[GroupView], alive: list[GroupView], refusals: Sequence[Refusal]
) -> list[Finding]:
    observed, wanted = plan.observed, plan.scale.replicas
    refusal = _refusal_cause(refusals[0]) if refusals else None
    problem = Cause(plan.problem.reason, plan.problem.message) if plan.problem else None
    relevant = [group for group in groups if group.revision == plan.revision] or groups
    failing = worst_of_groups(relevant, _most_restarts(plan)) if wanted else None
    router = _router(observed)
    ready = sum(group.ready for group in alive)
    current = sum(group.ready and group.revision == plan.revision for group in alive)
    cause = problem or refusal or failing
    progressing = _progressing(plan, alive, refusals)
    findings = [
        _ready(wanted, current, cause, progressing, router),
        _available(wanted, ready, router, cause),
        progressing,
        router,
        _model_loaded(wanted, ready, alive, cause),
        _degraded(observed, cause, router, worst([p for p in observed.router_pods if not p.deleting])),
        _capacity(plan, refusal),
    ]
    if plan.scale.active is not None:
        findings.append(Finding(c.SCALING_ACTIVE, plan.scale.active, plan.scale.reason, plan.scale.message))
    return findings


def _ready(wanted: int, current: int, cause: Cause | None, progressing: Finding, router: Finding) -> Finding:
    if wanted == 0 and cause is None:
        return Finding(c.READY, False, "Stopped", "no replicas are wanted")
    if cause and cause.severity != "waiting":
        return Finding(c.READY, False, cause.reason, cause.message)
    if progressing.status:
        return Finding(c.READY, False, cause.reason if cause else progressing.reason, progressing.message)
    if cause:
        return Finding(c.READY, False, cause.reason, cause.message)
    if not router.status:
        return Finding(c.READY, False, router.reason, router.message)
    return Finding(c.READY, True, "AllReplicasReady", f"{current} of {wanted} replicas answer requests")


def _available(wanted: int, ready: int, router: Finding, cause: Cause | None) -> Finding:
    if ready and router.status:
        return Finding(c.AVAILABLE, True, "Serving", f"{ready} of {wanted} replicas answer requests")
    if ready:
        return Finding(c.AVAILABLE, False, router.reason, router.message)
    if wanted == 0:
        return Finding(c.AVAILABLE, False, "Stopped", "no replicas are wanted")
    if cause:
        return Finding(c.AVAILABLE, False, cause.reason, cause.message)
    return Finding(c.AVAILABLE, False, "NoReplicas", "no replica is ready yet")


def _progressing(plan: Plan, alive: list[GroupView], refusals: Sequence[Refusal]) -> Finding:
    if plan.problem:
        return Finding(c.PROGRESSING, False, plan.problem.reason, plan.problem.message)
    if refusals:
        return Finding(c.PROGRESSING, False, "Refused", _refusal_cause(refusals[0]).message)
    wanted = plan.scale.replicas
    old = [group for group in alive if group.revision != plan.revision]
    current = [group for group in alive if group.revision == plan.revision]
    ready = sum(group.ready for group in current)
    if old:
        message = f"{ready} of {wanted} replicas run revision {plan.revision}; {len(old)} older ones are left"
        return Finding(c.PROGRESSING, True, "RollingUpdate", message)
    if len(current) != wanted:
        return Finding(c.PROGRESSING, True, "Scaling", f"{len(current)} replicas exist, {wanted} are wanted")
    if ready < wanted:
        return Finding(c.PROGRESSING, True, "Starting", f"{ready} of {wanted} replicas are ready")
    return Finding(c.PROGRESSING, False, "Settled", f"{wanted} replicas run revision {plan.revision}")


def _router(observed: Observed) -> Finding:
    raw = observed.objects.get(("Deployment", router_name(observed.owner)))
    cause = worst([pod for pod in observed.router_pods if not pod.deleting])
    if raw is None:
        return Finding(c.ROUTER_READY, False, "Creating", "the router's Deployment does not exist yet")
    status: dict[str, Any] = raw.get("status", {})
    ready, wanted = status.get("readyReplicas", 0), raw["spec"].get("replicas", 1)
    if ready >= 1:
        return Finding(c.ROUTER_READY, True, "Serving", f"{ready} of {wanted} router pods are ready")
    if observed.missing:
        return Finding(c.ROUTER_READY, False, "SecretNotFound", "; ".join(observed.missing))
    if observed.unusable:
        return Finding(c.ROUTER_READY, False, "SecretInvalid", "; ".join(observed.unusable))
    if cause:
        # "Loading" is about a model, which a router has not.
        message = cause.message.replace("is loading the model", "is not ready yet")
        return Finding(c.ROUTER_READY, False, "Starting" if cause.reason == "Loading" else cause.reason, message)
    failure = next((x for x in status.get("conditions", []) if x.get("type") == "ReplicaFailure"), None)
    if failure and failure.get("status") == "True":
        return Finding(c.ROUTER_READY, False, failure.get("reason", "ReplicaFailure"), failure.get("message", ""))
    return Finding(c.ROUTER_READY, False, "Starting", f"no router pod is ready yet, {wanted} are wanted")


def _model_loaded(wanted: int, ready: int, alive: list[GroupView], cause: Cause | None) -> Finding:
    if ready:
        return Finding(c.MODEL_LOADED, True, "Loaded", f"the model is loaded in {ready} of {len(alive)} replicas")
    if wanted == 0:
        return Finding(c.MODEL_LOADED, False, "Stopped", "no replicas are wanted")
    if cause is None:
        return Finding(c.MODEL_LOADED, False, "NoReplicas", "no replica has started yet")
    reason = "LoadFailed" if cause.reason == "CrashLoopBackOff" else cause.reason
    return Finding(c.MODEL_LOADED, False, reason, cause.message)


def _degraded(observed: Observed, cause: Cause | None, router: Finding, router_cause: Cause | None) -> Finding:
    if observed.isolated:
        return Finding(c.DEGRADED, True, "OperatorIsolated", observed.isolated)
    if cause and cause.severity != "waiting":
        return Finding(c.DEGRADED, True, cause.reason, cause.message)
    if router_cause and router_cause.severity != "waiting":
        return Finding(c.DEGRADED, True, "RouterFailing", f"{router_cause.reason}: {router_cause.message}")
    if observed.missing:
        return Finding(c.DEGRADED, True, "SecretNotFound", "; ".join(observed.missing))
    if observed.unusable:
        return Finding(c.DEGRADED, True, "SecretInvalid", "; ".join(observed.unusable))
    if router.reason == "FailedCreate":
        return Finding(c.DEGRADED, True, "RouterFailing", router.message)
    return Finding(c.DEGRADED, False, "AsExpected", "nothing is wrong")


def _capacity(plan: Plan, refusal: Cause | None) -> Finding:
    if refusal and refusal.severity == "capacity":
        return Finding(c.INSUFFICIENT_CAPACITY, True, refusal.reason, refusal.message)
    waiting = [pod for pod in plan.observed.pods if not pod.deleting and pod.unschedulable and not pod.node]
    lacking = worst(waiting)
    if lacking is None or lacking.severity != "capacity":
        return Finding(c.INSUFFICIENT_CAPACITY, False, "AsExpected", "every pod has a place")
    leaving, staying = plan.observed.leaving_nodes or {}, [p for p in plan.observed.pods if not p.deleting]
    old = any(pod.revision != plan.revision for pod in staying)
    moved = next((f"pod {pod.name} cannot move, {leaving[pod.node]}" for pod in staying if pod.node in leaving), "")
    spec = plan.observed.owner.spec
    if (old or moved) and spec and str(spec.rollout_strategy.max_unavailable) in ("0", "0%"):
        message = (
            f"{moved or 'the rollout waits for room for one more pod'}: {lacking.message}; free some, or set "
            "rolloutStrategy.maxUnavailable to 1 so that an old pod goes first"
        )
        return Finding(c.INSUFFICIENT_CAPACITY, True, "SurgeUnschedulable", message)
    return Finding(c.INSUFFICIENT_CAPACITY, True, lacking.reason, lacking.message)


def _terminating(plan: Plan) -> list[Finding]:
    message = "; ".join(f"{p.target}: {p.reason}" for p in plan.pending) or "everything is gone"
    return [
        Finding(c.READY, False, "Terminating", message),
        Finding(c.AVAILABLE, False, "Terminating", message),
        Finding(c.PROGRESSING, True, "Terminating", message),
    ]


def _phase(plan: Plan, findings: Sequence[Finding]) -> str:
    if plan.observed.owner.deleting:
        return "Terminating"
    true = {finding.type for finding in findings if finding.status}
    if c.DEGRADED in true:
        return "Degraded"
    if c.READY in true:
        return "Ready"
    if plan.scale.replicas == 0:
        return "Stopped"
    return "Progressing" if c.AVAILABLE in true else "Pending"
