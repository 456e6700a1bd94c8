"""The router's objects: Deployment, Service, and the ServiceAccount that may watch pods and nothing else. Pure."""

from typing import Any

from wherry_operator.api.kube import parse_duration
from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec, PriorityClass, Router
from wherry_operator.desired.access import access_args, access_environment, access_volumes
from wherry_operator.desired.common import (
    GRACE_MARGIN_S,
    RenderSettings,
    container_security,
    environment,
    labels,
    metadata,
    pod_security,
    probe,
    router_name,
    selector,
    stamped,
    template_annotations,
)
from wherry_operator.desired.response_cache import cache_args, cache_environment
from wherry_operator.desired.runtime import drain_seconds, lost_node_tolerations
from wherry_protocol import naming

CONTAINER = "router"
MIN_READY_S = 5
# After SIGTERM a router takes new requests for so long: nodes learn late that its Service has left it.
LINGER_S = 5


def router_args(owner: LLMDeployment, spec: LLMDeploymentSpec) -> list[str]:
    """The router's command line."""
    return [
        f"--deployment={owner.name}",
        f"--namespace={owner.namespace}",
        f"--host=$({naming.ENV_POD_IP})",
        "--loopback",
        f"--port={naming.ROUTER_PORT}",
        f"--model={spec.model.name}",
        f"--drain-timeout-s={drain_seconds(spec)}",
        f"--drain-grace-s={LINGER_S}",
        *([] if spec.failover.resume else ["--no-resume"]),
        *policy_args(spec),
        *admission_args(spec.router),
        *cache_args(owner, spec),
        *access_args(owner, spec),
    ]


def admission_args(router: Router) -> list[str]:
    """Priority classes and the queue."""
    queue = router.queue
    return [
        *(f"--priority-class={_class(one)}" for one in router.priority_classes or ()),
        f"--queue-max-requests={queue.max_requests}",
        f"--queue-max-tokens={queue.max_tokens}",
        f"--queue-timeout-s={parse_duration(queue.timeout):g}",
        f"--no-replica-wait-s={parse_duration(queue.start_timeout):g}",
    ]


def _class(one: PriorityClass) -> str:
    bounds = {"max-queued-requests": one.max_queued_requests, "max-queued-tokens": one.max_queued_tokens}
    fields = [f"name={one.name}", f"priority={one.priority}"]
    fields += [f"{name}={bound}" for name, bound in bounds.items() if bound is not None]
    return ",".join(fields + ["default"] * one.default)


def policy_args(spec: LLMDeploymentSpec) -> list[str]:
    """How the router chooses replicas. Its own default is not named: routers that are there need not be exchanged."""
    return [] if spec.router.policy == Router().policy else [f"--policy={spec.router.policy}"]


def router_template(
    owner: LLMDeployment, spec: LLMDeploymentSpec, settings: RenderSettings, token: str
) -> dict[str, Any]:
    """The template of the router's pods."""
    return {
        "metadata": {
            "labels": labels(owner, naming.COMPONENT_ROUTER),
            "annotations": template_annotations(owner, token),
        },
        "spec": _pod_spec(owner, spec, settings),
    }


def router_objects(owner: LLMDeployment, spec: LLMDeploymentSpec, template: dict[str, Any]) -> list[dict[str, Any]]:
    """All of the router's objects, in the order in which they are applied; its pods are made from `template`."""
    bodies = [*_access(owner), _service(owner), _deployment(owner, spec, template)]
    return [stamped(body) for body in bodies]


def _access(owner: LLMDeployment) -> list[dict[str, Any]]:
    name = router_name(owner)
    rbac = "rbac.authorization.k8s.io"
    meta = metadata(owner, name, naming.COMPONENT_ROUTER)
    return [
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": meta, "automountServiceAccountToken": False},
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "Role",
            "metadata": meta,
            "rules": [{"apiGroups": [""], "resources": ["pods"], "verbs": ["get", "list", "watch"]}],
        },
        {
            "apiVersion": f"{rbac}/v1",
            "kind": "RoleBinding",
            "metadata": meta,
            "roleRef": {"apiGroup": rbac, "kind": "Role", "name": name},
            "subjects": [{"kind": "ServiceAccount", "name": name, "namespace": owner.namespace}],
        },
    ]


def _service(owner: LLMDeployment) -> dict[str, Any]:
    port = {"name": "http", "port": naming.SERVICE_PORT, "targetPort": "http", "protocol": "TCP"}
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": metadata(owner, owner.name, naming.COMPONENT_ROUTER),
        "spec": {"type": "ClusterIP", "selector": selector(owner, naming.COMPONENT_ROUTER), "ports": [port]},
    }


def _deployment(owner: LLMDeployment, spec: LLMDeploymentSpec, template: dict[str, Any]) -> dict[str, Any]:
    chosen = selector(owner, naming.COMPONENT_ROUTER)
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": metadata(owner, router_name(owner), naming.COMPONENT_ROUTER),
        "spec": {
            "replicas": spec.router.replicas,
            # Before an old router goes, the new one has been in every node's rules for its Service for a while.
            "minReadySeconds": MIN_READY_S,
            "selector": {"matchLabels": chosen},
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "template": template,
        },
    }


def _pod_spec(owner: LLMDeployment, spec: LLMDeploymentSpec, settings: RenderSettings) -> dict[str, Any]:
    tls, secrets = spec.router.tls is not None, access_volumes(spec)
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": spec.router.image or settings.router_image,
        "command": ["wherry-router"],
        "args": router_args(owner, spec),
        "env": [*environment(owner), *access_environment(spec), *cache_environment(spec)],
        "ports": [{"name": "http", "containerPort": naming.ROUTER_PORT, "protocol": "TCP"}],
        "startupProbe": probe("/healthz", period=1, failures=60, tls=tls),
        "livenessProbe": probe("/healthz", period=5, failures=6, tls=tls),
        "readinessProbe": probe("/readyz", period=2, failures=3, tls=tls),
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - the container's own
            *(mount for _, mount in secrets),
        ],
    }
    if spec.router.resources:
        container["resources"] = spec.router.resources.to_wire()
    pod: dict[str, Any] = {
        "automountServiceAccountToken": True,
        "containers": [container],
        "enableServiceLinks": False,
        "securityContext": pod_security(),
        "serviceAccountName": router_name(owner),
        "terminationGracePeriodSeconds": drain_seconds(spec) + GRACE_MARGIN_S,
        "tolerations": lost_node_tolerations(),
        "volumes": [{"name": "tmp", "emptyDir": {}}, *(volume for volume, _ in secrets)],
    }
    if spec.image_pull_secrets:
        pod["imagePullSecrets"] = [secret.to_wire() for secret in spec.image_pull_secrets]
    return pod
