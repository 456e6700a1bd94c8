"""The model in runtime pods: what is mounted, and what they are told of it. Pure."""

from typing import Any

from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_protocol import naming

MODELS_DIR = "/models"
CACHE_DIR = "/var/cache/wherry/models"
SECRET_DIR = "/etc/wherry/model-secret"  # noqa: S105 - a path
# The group that the image's user is in: a claim that was made by root becomes writable for it.
GROUP_ID = 65532

DOWNLOADED = ("hf://", "s3://", "https://", "http://", "oci://")


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


def model_volumes(spec: LLMDeploymentSpec) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """What the model needs in a pod, as volumes and their mounts."""
    if claim := claim_of(spec.model.uri):
        volume = {"name": "model", "persistentVolumeClaim": {"claimName": claim[0], "readOnly": True}}
        return [(volume, {"name": "model", "mountPath": f"{MODELS_DIR}/{claim[0]}", "readOnly": True})]
    if not spec.model.uri.startswith(DOWNLOADED):
        return []
    found: list[tuple[dict[str, Any], dict[str, Any]]] = []
    found.append(({"name": "model-cache", **_cache(spec)}, {"name": "model-cache", "mountPath": CACHE_DIR}))
    if secret := spec.model.secret_name:
        volume = {"name": "model-secret", "secret": {"secretName": secret, "defaultMode": 0o444}}
        found.append((volume, {"name": "model-secret", "mountPath": SECRET_DIR, "readOnly": True}))
    return found


def _cache(spec: LLMDeploymentSpec) -> dict[str, Any]:
    cache = spec.model_cache
    if cache and cache.claim_name:
        return {"persistentVolumeClaim": {"claimName": cache.claim_name}}
    if cache and cache.host_path:
        # It has to be there: one that the kubelet makes belongs to root.
        return {"hostPath": {"path": cache.host_path, "type": "Directory"}}
    return {"emptyDir": {"sizeLimit": str(cache.size_limit)} if cache and cache.size_limit else {}}


def model_environment(spec: LLMDeploymentSpec) -> list[dict[str, Any]]:
    """Where the downloaded model and the credentials for it are."""
    if not spec.model.uri.startswith(DOWNLOADED):
        return []
    found = [{"name": naming.ENV_MODEL_CACHE, "value": CACHE_DIR}]
    if spec.model.secret_name:
        found.append({"name": naming.ENV_MODEL_SECRET, "value": SECRET_DIR})
    return found


def model_security(spec: LLMDeploymentSpec) -> dict[str, Any]:
    """What a pod's security context needs so that its cache can be written."""
    if spec.model_cache and spec.model_cache.claim_name:
        return {"fsGroup": GROUP_ID, "fsGroupChangePolicy": "OnRootMismatch"}
    return {}
