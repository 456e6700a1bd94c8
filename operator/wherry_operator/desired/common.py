"""What every object that Wherry makes has in common. Pure."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from wherry_operator.api.resource import LLMDeployment
from wherry_protocol import naming

MANAGER = "wherry-operator"
ANNOTATION_APPLIED = f"{naming.DOMAIN}/applied"
ANNOTATION_TOKEN = f"{naming.DOMAIN}/token"
# On an LLMDeployment: a new value exchanges all pods for some that are made as the operator makes them now.
ANNOTATION_ROLLOUT = f"{naming.DOMAIN}/rollout"
ANNOTATION_FAILURES = f"{naming.DOMAIN}/failures"
ANNOTATION_CAUSE = f"{naming.DOMAIN}/failed-before"
ANNOTATION_AVOID = f"{naming.DOMAIN}/avoided-nodes"
# Kept free at the end of the grace period, so that a runtime that uses its whole drain timeout still exits by itself.
GRACE_MARGIN_S = 10


@dataclass(frozen=True)
class RenderSettings:
    """The operator's own settings that end up in objects."""

    runtime_image: str = "wherry-runtime:latest"
    router_image: str = "wherry-router:latest"


def labels(owner: LLMDeployment, component: str) -> dict[str, str]:
    """The labels of everything that belongs to `owner`'s `component`."""
    return {
        naming.LABEL_NAME: f"wherry-{component}",
        naming.LABEL_INSTANCE: owner.name,
        naming.LABEL_COMPONENT: component,
        naming.LABEL_PART_OF: "wherry",
        naming.LABEL_MANAGED_BY: MANAGER,
        naming.LABEL_DEPLOYMENT: owner.name,
    }


def selector(owner: LLMDeployment, component: str) -> dict[str, str]:
    """The two labels that select the pods of `component`."""
    return {naming.LABEL_DEPLOYMENT: owner.name, naming.LABEL_COMPONENT: component}


def selector_text(owner: LLMDeployment, component: str = naming.COMPONENT_RUNTIME) -> str:
    """The same as a label selector's text."""
    return ",".join(f"{key}={value}" for key, value in selector(owner, component).items())


def metadata(owner: LLMDeployment, name: str, component: str) -> dict[str, Any]:
    """Metadata of an object that `owner` controls."""
    return {
        "name": name,
        "namespace": owner.namespace,
        "labels": labels(owner, component),
        "ownerReferences": [owner.owner_reference()],
    }


def digest(value: Any, length: int = 10) -> str:
    """A stable hash of plain data."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


def stamped(body: dict[str, Any]) -> dict[str, Any]:
    """The object with a hash of itself, by which a later version of it can be told apart without reading defaults."""
    annotations = {**body["metadata"].get("annotations", {}), ANNOTATION_APPLIED: digest(body)}
    return {**body, "metadata": {**body["metadata"], "annotations": annotations}}


def template_annotations(owner: LLMDeployment, token: str) -> dict[str, str]:
    """What makes pods be exchanged though nothing else about them changes: a new token, or the wish for new pods."""
    # The hash of a random 256-bit value gives nothing away.
    found = {ANNOTATION_TOKEN: digest(token)}
    if rollout := owner.annotations.get(ANNOTATION_ROLLOUT):
        found[ANNOTATION_ROLLOUT] = rollout
    return found


def pod_security() -> dict[str, Any]:
    """A pod security context that Pod Security `restricted` admits."""
    return {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def container_security() -> dict[str, Any]:
    """A container security context that Pod Security `restricted` admits."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def environment(owner: LLMDeployment) -> list[dict[str, Any]]:
    """Who and where the pod is, and the token that its peers know."""

    def field(name: str, path: str) -> dict[str, Any]:
        return {"name": name, "valueFrom": {"fieldRef": {"apiVersion": "v1", "fieldPath": path}}}

    reference = {"name": token_secret_name(owner), "key": "token"}
    return [
        field(naming.ENV_POD_IP, "status.podIP"),
        field(naming.ENV_POD_NAME, "metadata.name"),
        field(naming.ENV_POD_NAMESPACE, "metadata.namespace"),
        {"name": naming.ENV_WORKER_TOKEN, "valueFrom": {"secretKeyRef": reference}},
    ]


def probe(
    path: str, period: int, failures: int, timeout: int = 5, *, tls: bool = False, port: str = naming.PORT_PLAIN
) -> dict[str, Any]:
    """An HTTP probe of the port called `port`; times in seconds."""
    return {
        "httpGet": {"path": path, "port": port, **({"scheme": "HTTPS"} if tls else {})},
        "periodSeconds": period,
        "timeoutSeconds": timeout,
        "failureThreshold": failures,
    }


def token_secret_name(owner: LLMDeployment) -> str:
    """Name of the Secret with the worker token."""
    return f"{owner.name}-worker-token"


def router_name(owner: LLMDeployment) -> str:
    """Name of the router's Deployment, ServiceAccount, Role and RoleBinding."""
    return f"{owner.name}-router"
