"""The runtime's pods: spec → pod template → pod. Pure."""

import copy
from typing import Any

from wherry_operator.api.kube import parse_duration
from wherry_operator.api.resource import InvalidSpecError, LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_operator.desired.common import (
    ANNOTATION_FAILURES,
    ANNOTATION_TOKEN,
    GRACE_MARGIN_S,
    RenderSettings,
    container_security,
    digest,
    environment,
    labels,
    pod_security,
    probe,
    selector,
)
from wherry_operator.desired.merge import MergeError, strategic_merge
from wherry_protocol import naming
from wherry_protocol.engine_config import EngineConfig, to_args
from wherry_protocol.quantity import parse_quantity

CONTAINER = "runtime"
MODELS_DIR = "/models"
# Kubernetes' own default is 300 s: far too long to wait for a replacement of a replica that nobody can reach.
NODE_LOST_SECONDS = 10
# The scheduler spreads pods of Services and ReplicaSets by itself; runtime pods belong to neither.
SPREAD = {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}


def engine_config(spec: LLMDeploymentSpec) -> EngineConfig:
    """The engine's settings; what the spec leaves out stays at the engine's default."""
    given = spec.batching.model_dump(exclude_none=True)
    if (memory := given.pop("kv_cache_memory", None)) is not None:
        given["kv_cache_bytes"] = int(parse_quantity(memory))
    return EngineConfig(
        model_name=spec.model.name,
        model_uri=container_uri(spec.model.uri),
        host=f"$({naming.ENV_POD_IP})",
        port=naming.WORKER_PORT,
        dtype=spec.dtype,
        quantization=spec.quantization.method,
        kv_cache_dtype=spec.quantization.kv_cache,
        drain_timeout_s=drain_seconds(spec),
        **given,
    )


def drain_seconds(spec: LLMDeploymentSpec) -> int:
    """`rolloutStrategy.drainTimeout` in whole seconds."""
    return int(parse_duration(spec.rollout_strategy.drain_timeout))


def claim_of(uri: str) -> tuple[str, str] | None:
    """The claim and the path of a pvc URI; None for other URIs."""
    if not uri.startswith("pvc://"):
        return None
    claim, _, path = uri.removeprefix("pvc://").partition("/")
    return claim, path


def container_uri(uri: str) -> str:
    """The model's URI as the container sees it: claims are mounted under /models."""
    if claim := claim_of(uri):
        return f"file://{MODELS_DIR}/{claim[0]}/{claim[1]}".rstrip("/")
    return uri


def pod_template(owner: LLMDeployment, spec: LLMDeploymentSpec, settings: RenderSettings, token: str) -> dict[str, Any]:
    """The template that every runtime pod is made from, without group and rank.

    Raises:
        InvalidSpecError: spec.podTemplate cannot be merged.
    """
    base = {
        "metadata": {
            "labels": labels(owner, naming.COMPONENT_RUNTIME),
            # A new token needs new pods; the hash of a random 256-bit value gives nothing away.
            "annotations": {ANNOTATION_TOKEN: digest(token)},
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
    if claim := claim_of(spec.model.uri):
        volumes.append({"name": "model", "persistentVolumeClaim": {"claimName": claim[0], "readOnly": True}})
        mounts.append({"name": "model", "mountPath": f"{MODELS_DIR}/{claim[0]}", "readOnly": True})
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": spec.image or settings.runtime_image,
        "command": ["wherry-runtime"],
        "args": to_args(engine_config(spec)),
        "env": environment(owner),
        "ports": [{"name": "http", "containerPort": naming.WORKER_PORT, "protocol": "TCP"}],
        # /health answers from the moment that the process listens, also while it loads the model.
        "startupProbe": probe("/health", period=2, failures=90),
        "livenessProbe": probe("/health", period=5, failures=6),
        "readinessProbe": probe("/ready", period=2, failures=3),
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
        "restartPolicy": "Always",
        "securityContext": pod_security(),
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


def _tolerations(spec: LLMDeploymentSpec) -> list[dict[str, Any]]:
    given = [toleration.to_wire() for toleration in spec.tolerations or []]
    named = {toleration.get("key") for toleration in given}
    defaults = [
        {"key": key, "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": NODE_LOST_SECONDS}
        for key in ("node.kubernetes.io/not-ready", "node.kubernetes.io/unreachable")
        if key not in named and None not in named
    ]
    return given + defaults


def revision_of(template: dict[str, Any]) -> str:
    """A stable hash of the template: pods with another one are out of date."""
    return digest(template)


def pod(owner: LLMDeployment, template: dict[str, Any], group: str, rank: int = 0, failures: int = 0) -> dict[str, Any]:
    """One pod of a group. `failures`: how many of its predecessors failed in a row."""
    metadata = copy.deepcopy(template.get("metadata", {}))
    metadata["name"] = f"{owner.name}-{group}-{rank}"
    metadata["namespace"] = owner.namespace
    metadata["labels"] |= {
        naming.LABEL_GROUP: group,
        naming.LABEL_RANK: str(rank),
        naming.LABEL_REVISION: revision_of(template),
    }
    if failures:
        metadata.setdefault("annotations", {})[ANNOTATION_FAILURES] = str(failures)
    metadata["ownerReferences"] = [owner.owner_reference()]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": copy.deepcopy(template["spec"])}
