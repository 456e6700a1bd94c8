"""The runtime's pods: spec → pod template → pod. Pure."""

import copy
from dataclasses import dataclass
from typing import Any

import msgspec

from wherry_operator.api.kube import parse_duration
from wherry_operator.api.resource import InvalidSpecError, LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_operator.desired.access import WORKER_TLS_DIR, worker_name, worker_tls_volumes
from wherry_operator.desired.common import (
    ANNOTATION_AVOID,
    ANNOTATION_CAUSE,
    ANNOTATION_FAILURES,
    GRACE_MARGIN_S,
    RenderSettings,
    container_security,
    digest,
    environment,
    labels,
    pod_security,
    probe,
    selector,
    template_annotations,
)
from wherry_operator.desired.merge import MergeError, strategic_merge
from wherry_operator.desired.model import container_uri, model_environment, model_security, model_volumes
from wherry_protocol import naming
from wherry_protocol.engine_config import EngineConfig, to_args
from wherry_protocol.quantity import parse_quantity

CONTAINER = "runtime"
PROBE = "probe"
# Kubernetes' own default is 300 s: far too long to wait for a replacement of a replica that nobody can reach.
NODE_LOST_SECONDS = 10
# Of a cause that is written on the pod that takes over.
MAX_CAUSE = 300
# The scheduler spreads pods of Services and ReplicaSets by itself; runtime pods belong to neither.
SPREAD = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}


def engine_config(spec: LLMDeploymentSpec) -> EngineConfig:
    """The engine's settings but for TLS; what the spec leaves out stays at the engine's default."""
    given = spec.batching.model_dump(exclude_none=True)
    if (memory := given.pop("kv_cache_memory", None)) is not None:
        given["kv_cache_bytes"] = int(parse_quantity(memory))
    if (tensor := spec.parallelism.tensor) > 1:
        given |= {"tensor_parallel": tensor, "ranks_per_pod": tensor // spec.parallelism.pods}
    return EngineConfig(
        model_name=spec.model.name,
        model_uri=container_uri(spec.model.uri),
        host=f"$({naming.ENV_POD_IP})",
        port=naming.WORKER_PORT,
        dtype=spec.dtype,
        quantization=spec.quantization.method,
        measure_quality=spec.quantization.measure,
        kv_cache_dtype=spec.quantization.kv_cache,
        drain_timeout_s=drain_seconds(spec),
        **given,
    )


def worker_config(owner: LLMDeployment, spec: LLMDeploymentSpec) -> EngineConfig:
    """The settings of a worker in a pod."""
    config = engine_config(spec)
    if spec.worker_tls is None:
        return config
    name = worker_name(owner, spec)
    return msgspec.structs.replace(
        config, worker_tls=WORKER_TLS_DIR, worker_tls_name=name, probe_port=naming.PROBE_PORT
    )


def drain_seconds(spec: LLMDeploymentSpec) -> int:
    """`rolloutStrategy.drainTimeout` in whole seconds."""
    return int(parse_duration(spec.rollout_strategy.drain_timeout))


def pod_template(owner: LLMDeployment, spec: LLMDeploymentSpec, settings: RenderSettings, token: str) -> dict[str, Any]:
    """The template that every runtime pod is made from, without group and rank.

    Raises:
        InvalidSpecError: spec.podTemplate cannot be merged.
    """
    base = {
        "metadata": {
            "labels": labels(owner, naming.COMPONENT_RUNTIME),
            "annotations": template_annotations(owner, token),
        },
        "spec": _pod_spec(owner, spec, settings),
    }
    if not spec.pod_template:
        return base
    try:
        merged = strategic_merge(base, spec.pod_template)
    except MergeError as error:
        raise InvalidSpecError(f"spec.{error}") from error
    _check(merged)
    # By these the router and the operator find the pod, so they are not for anyone to change.
    merged["metadata"].setdefault("labels", {}).update(base["metadata"]["labels"])
    return merged


def _check(template: dict[str, Any]) -> None:
    containers = template["spec"].get("containers") or []
    runtime = next((c for c in containers if c.get("name") == CONTAINER), None)
    if runtime is None:
        raise InvalidSpecError(f"spec.podTemplate removes the container {CONTAINER!r}, which runs the engine")
    for container in containers:
        if not container.get("image"):
            raise InvalidSpecError(
                f"spec.podTemplate adds the container {container.get('name')!r} without an image; to change the "
                f"engine's container name it {CONTAINER!r}"
            )
    if template["spec"].get("restartPolicy", "Always") != "Always":
        raise InvalidSpecError("spec.podTemplate sets restartPolicy; runtime pods need Always")


def _pod_spec(owner: LLMDeployment, spec: LLMDeploymentSpec, settings: RenderSettings) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [{"name": "tmp", "emptyDir": {}}]
    mounts: list[dict[str, Any]] = [{"name": "tmp", "mountPath": "/tmp"}]  # noqa: S108 - the container's own
    for volume, mount in model_volumes(spec) + worker_tls_volumes(spec):
        volumes.append(volume)
        mounts.append(mount)
    # Kubelets have no certificate to show, so with TLS they ask elsewhere.
    asked = PROBE if spec.worker_tls else naming.PORT_PLAIN
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": spec.image or settings.runtime_image,
        "command": ["wherry-runtime"],
        "args": to_args(worker_config(owner, spec)),
        "env": [*environment(owner), *_group_environment(spec), *model_environment(spec)],
        "ports": _ports(spec),
        # /health answers from the moment that the process listens, also while it downloads and loads the model.
        "startupProbe": probe("/health", period=2, failures=90, port=asked),
        "livenessProbe": probe("/health", period=5, failures=6, port=asked),
        "readinessProbe": probe("/ready", period=2, failures=3, port=asked),
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": mounts,
    }
    if spec.resources:
        container["resources"] = spec.resources.to_wire()
    pod: dict[str, Any] = {
        "automountServiceAccountToken": False,
        "containers": [container],
        "enableServiceLinks": False,
        # Until a router knows the pod no rollout takes down another for it.
        "readinessGates": [{"conditionType": naming.GATE_ROUTABLE}],
        "restartPolicy": "Always",
        "securityContext": pod_security() | model_security(spec),
        "terminationGracePeriodSeconds": drain_seconds(spec) + GRACE_MARGIN_S,
        "tolerations": _tolerations(spec),
        "volumes": volumes,
    }
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = [secret.to_wire() for secret in spec.image_pull_secrets]
    if spec.node_selector:
        pod["nodeSelector"] = dict(spec.node_selector)
    if spec.affinity:
        pod["affinity"] = copy.deepcopy(spec.affinity)
    given = [constraint.to_wire() for constraint in spec.topology_spread_constraints or []]
    default = {"labelSelector": {"matchLabels": selector(owner, naming.COMPONENT_RUNTIME)}}
    pod["topologySpreadConstraints"] = [default | constraint for constraint in given or [SPREAD]]
    return pod


def _group_environment(spec: LLMDeploymentSpec) -> list[dict[str, Any]]:
    """Which group the pod is of; in a group of several pods also its place in it. `pod` adds the leader's address."""

    def label(name: str, key: str) -> dict[str, Any]:
        path = f"metadata.labels['{key}']"
        return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}

    own = [label(naming.ENV_GROUP, naming.LABEL_GROUP)]
    if (pods := spec.parallelism.pods) == 1:
        return own
    return [
        *own,
        {"name": naming.ENV_GROUP_SIZE, "value": str(pods)},
        label(naming.ENV_WORKER_INDEX, naming.LABEL_RANK),
    ]


def _ports(spec: LLMDeploymentSpec) -> list[dict[str, Any]]:
    api = naming.PORT_TLS if spec.worker_tls else naming.PORT_PLAIN
    ports = [{"name": api, "containerPort": naming.WORKER_PORT, "protocol": "TCP"}]
    if spec.worker_tls:
        ports.append({"name": PROBE, "containerPort": naming.PROBE_PORT, "protocol": "TCP"})
    if spec.parallelism.pods > 1:
        ports.append({"name": "group", "containerPort": naming.GROUP_PORT, "protocol": "TCP"})
    return ports


def _tolerations(spec: LLMDeploymentSpec) -> list[dict[str, Any]]:
    given = [toleration.to_wire() for toleration in spec.tolerations or []]
    named = {toleration.get("key") for toleration in given}
    return given + [t for t in lost_node_tolerations() if t["key"] not in named and None not in named]


def lost_node_tolerations() -> list[dict[str, Any]]:
    """How long a pod is kept on a node that Kubernetes holds for lost."""
    return [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_LOST_SECONDS}
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
    ]


def revision_of(template: dict[str, Any]) -> str:
    """A stable hash of the template: the name of a revision that begins now. See planning/revisions.py."""
    return digest(template)


@dataclass(frozen=True)
class Origin:
    """Why and how a pod is made, as it is written on it.

    `leader`: IP of the group's pod 0, for the others. `failures`: groups before this one that failed in a row, and
    `cause` what the last of them died of. `avoid`: nodes that are lost, where it must not be bound. `revision`: the
    name of what it is made from; empty takes the template's hash.
    """

    leader: str = ""
    failures: int = 0
    cause: str = ""
    avoid: tuple[str, ...] = ()
    revision: str = ""


def pod(
    owner: LLMDeployment, template: dict[str, Any], group: str, index: int = 0, origin: Origin | None = None
) -> dict[str, Any]:
    """Pod number `index` of a group."""
    origin = origin or Origin()
    metadata = copy.deepcopy(template.get("metadata", {}))
    metadata["name"] = pod_name(owner, group, index)
    metadata["namespace"] = owner.namespace
    metadata["labels"] |= {
        naming.LABEL_GROUP: group,
        naming.LABEL_RANK: str(index),
        naming.LABEL_REVISION: origin.revision or revision_of(template),
    }
    notes = {
        ANNOTATION_FAILURES: str(origin.failures or ""),
        ANNOTATION_CAUSE: origin.cause[:MAX_CAUSE],
        ANNOTATION_AVOID: ",".join(origin.avoid),
    }
    if notes := {key: value for key, value in notes.items() if value}:
        metadata.setdefault("annotations", {}).update(notes)
    metadata["ownerReferences"] = [owner.owner_reference()]
    spec = copy.deepcopy(template["spec"])
    _tell_leader(spec, index, origin.leader)
    _avoid(spec, origin.avoid)
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def pod_name(owner: LLMDeployment, group: str, index: int) -> str:
    """Name of pod number `index` of `group`."""
    return f"{owner.name}-{group}-{index}"


def _tell_leader(spec: dict[str, Any], index: int, leader: str) -> None:
    """Adds the leader's address to the engine's container, in groups of several pods."""
    container = next(c for c in spec["containers"] if c["name"] == CONTAINER)
    env = container.get("env", [])
    at = next((i for i, entry in enumerate(env) if entry["name"] == naming.ENV_WORKER_INDEX), None)
    if at is None:
        return
    own = {"valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": "status.podIP"}}}
    address = own if index == 0 else {"value": leader}
    env.insert(at + 1, {"name": naming.ENV_LEADER_ADDRESS, **address})


def _avoid(spec: dict[str, Any], nodes: tuple[str, ...]) -> None:
    """Keeps the pod off `nodes`: the scheduler does not know yet that they are lost."""
    if not nodes:
        return
    # The API server takes one value only for each requirement on a field; those of a term must all hold.
    fields = [{"key": "metadata.name", "operator": "NotIn", "values": [node]} for node in nodes]
    affinity = spec.setdefault("affinity", {}).setdefault("nodeAffinity", {})
    required = affinity.setdefault("requiredDuringSchedulingIgnoredDuringExecution", {})
    # Terms are alternatives, so each of them has to say it.
    terms = required.get("nodeSelectorTerms") or [{}]
    required["nodeSelectorTerms"] = [term | {"matchFields": [*term.get("matchFields", []), *fields]} for term in terms]
