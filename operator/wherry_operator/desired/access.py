"""Keys, limits and TLS of the router, TLS to its workers: flags, environment, and the Secrets that are mounted. Pure.

Secrets are mounted as they are, not as something that may be missing: a router without its keys or its certificate must
not serve, the kubelet starts it as soon as the Secret is there, and until then those of before go on.
"""

from typing import Any, NamedTuple

from wherry_operator.api.access import LimitSet, RedisAt
from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_protocol import naming
from wherry_protocol.http import mutual_tls

WORKER_TLS_FIELD = "spec.workerTLS"
KEYS_DIR = "/etc/wherry/keys"
TLS_DIR = "/etc/wherry/tls"
WORKER_TLS_DIR = "/etc/wherry/worker-tls"


class NeededSecret(NamedTuple):
    """A Secret that the spec names. `entries`: what it must have, at least one of any kind where there is none here."""

    field: str
    name: str
    entries: tuple[str, ...] = ()


def needed_secrets(spec: LLMDeploymentSpec) -> list[NeededSecret]:
    """The Secrets that somebody else has to make."""
    router, found = spec.router, list[NeededSecret]()
    if spec.model.secret_name:
        found.append(NeededSecret("spec.model", spec.model.secret_name))
    if router.auth and router.auth.secret_name:
        found.append(NeededSecret("spec.router.auth", router.auth.secret_name))
    if router.limits and router.limits.redis and router.limits.redis.secret_name:
        found.append(NeededSecret("spec.router.limits.redis", router.limits.redis.secret_name, ("url",)))
    if router.tls:
        found.append(NeededSecret("spec.router.tls", router.tls.secret_name, ("tls.crt", "tls.key")))
    if spec.worker_tls:
        found.append(NeededSecret(WORKER_TLS_FIELD, spec.worker_tls.secret_name, mutual_tls.ENTRIES))
    return found


def worker_name(owner: LLMDeployment, spec: LLMDeploymentSpec) -> str:
    """The name in the certificate of `owner`'s workers. It is not one that DNS knows."""
    given = spec.worker_tls.server_name if spec.worker_tls else None
    return given or f"{owner.name}-workers.{owner.namespace}.svc"


def access_args(owner: LLMDeployment, spec: LLMDeploymentSpec) -> list[str]:
    """The router's flags."""
    router, args = spec.router, []
    if router.auth and router.auth.secret_name:
        args.append(f"--api-keys={KEYS_DIR}")
    if router.auth and (oidc := router.auth.oidc):
        args += [f"--oidc-issuer={oidc.issuer}", f"--oidc-audience={oidc.audience}"]
        args.append(f"--oidc-tenant-claim={oidc.tenant_claim}")
    args += _limit_args(owner, spec)
    if router.tls:
        args += [f"--tls-cert={TLS_DIR}/tls.crt", f"--tls-key={TLS_DIR}/tls.key"]
    if spec.worker_tls:
        args += [f"--worker-tls={WORKER_TLS_DIR}", f"--worker-tls-name={worker_name(owner, spec)}"]
    return args


def _limit_args(owner: LLMDeployment, spec: LLMDeploymentSpec) -> list[str]:
    limits, args = spec.router.limits, []
    if limits:
        named = {"key": limits.per_key, "tenant": limits.per_tenant, "total": limits.total}
        args += [f"--limit-{name}={text}" for name, given in named.items() if (text := _text(given))]
        if limits.redis:
            args.append(f"--limit-fallback={limits.redis.fallback}")
            args.append(f"--limit-namespace={owner.namespace}/{owner.name}")
    # Keys may have limits of their own, which the operator does not read.
    if limits or (spec.router.auth and spec.router.auth.secret_name):
        args.append(f"--limit-routers={spec.router.replicas}")
    return args


def _text(limits: LimitSet | None) -> str:
    if limits is None:
        return ""
    parts = {
        "requests": limits.requests_per_minute,
        "tokens": limits.tokens_per_minute,
        "concurrent": limits.concurrent,
    }
    return ",".join(f"{name}={number}" for name, number in parts.items() if number)


def access_environment(spec: LLMDeploymentSpec) -> list[dict[str, Any]]:
    """Redis' URL."""
    return redis_environment(naming.ENV_REDIS_URL, spec.router.limits.redis if spec.router.limits else None)


def redis_environment(variable: str, redis: RedisAt | None) -> list[dict[str, Any]]:
    """The variable that holds the URL of `redis`, if there is one."""
    if redis is None:
        return []
    if redis.secret_name:
        return [from_secret(variable, redis.secret_name, "url")]
    return [{"name": variable, "value": redis.url}]


def from_secret(variable: str, secret: str, entry: str) -> dict[str, Any]:
    """A variable that holds an entry of a Secret."""
    return {"name": variable, "valueFrom": {"secretKeyRef": {"name": secret, "key": entry}}}


def access_volumes(spec: LLMDeploymentSpec) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Each Secret that is mounted, as a volume and its mount."""
    router, found = spec.router, []
    if router.auth and router.auth.secret_name:
        found.append(_mounted("api-keys", router.auth.secret_name, KEYS_DIR))
    if router.tls:
        found.append(_mounted("tls", router.tls.secret_name, TLS_DIR))
    return found + worker_tls_volumes(spec)


def worker_tls_volumes(spec: LLMDeploymentSpec) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """The Secret between routers and workers, which both mount."""
    return [_mounted("worker-tls", spec.worker_tls.secret_name, WORKER_TLS_DIR)] if spec.worker_tls else []


def _mounted(name: str, secret: str, path: str) -> tuple[dict[str, Any], dict[str, Any]]:
    # Readable for the router's user, whoever that is, and for nobody outside the pod.
    volume = {"name": name, "secret": {"secretName": secret, "defaultMode": 0o444}}
    return volume, {"name": name, "mountPath": path, "readOnly": True}
