"""Reads everything that exists for one LLMDeployment."""

import asyncio
import base64
import binascii
from typing import Any

from wherry_operator.api.resource import LLMDeployment
from wherry_operator.cluster.client import Api
from wherry_operator.desired.access import WORKER_TLS_FIELD, NeededSecret, needed_secrets, worker_name
from wherry_operator.desired.common import router_name, token_secret_name
from wherry_operator.desired.disruption import router_budget_name, runtime_budget_name
from wherry_operator.desired.response_cache import cache_secrets
from wherry_operator.planning.objects import owned
from wherry_operator.planning.pods import PodView
from wherry_operator.planning.revisions import KIND as REVISION
from wherry_operator.planning.types import Observed, WorkerClient
from wherry_protocol import naming
from wherry_protocol.http import mutual_tls
from wherry_protocol.http.tls import TlsError


def children(owner: LLMDeployment) -> list[tuple[str, str]]:
    """Kind and name of every child that is not a pod."""
    router = router_name(owner)
    named = [(kind, router) for kind in ("ServiceAccount", "Role", "RoleBinding", "Deployment")]
    budgets = [("PodDisruptionBudget", name(owner)) for name in (runtime_budget_name, router_budget_name)]
    return [("Secret", token_secret_name(owner)), ("Service", owner.name), *named, *budgets]


async def read(api: Api, raw: dict[str, Any]) -> Observed:
    """The snapshot for the LLMDeployment `raw`.

    Raises:
        ApiError, Unavailable: something could not be read; nothing may be concluded from the rest then.
    """
    owner = LLMDeployment.from_raw(raw)
    keys = children(owner)
    selector = f"{naming.LABEL_DEPLOYMENT}={owner.name}"
    pods, revisions, *found = await asyncio.gather(
        api.list("Pod", owner.namespace, selector),
        api.list(REVISION, owner.namespace, selector),
        *(api.get(kind, owner.namespace, name) for kind, name in keys),
    )
    objects = {key: value for key, value in zip(keys, found, strict=True) if value is not None}
    objects |= {(REVISION, raw["metadata"]["name"]): {"kind": REVISION} | raw for raw in revisions}
    runtime = [p for p in pods if _component(p) == naming.COMPONENT_RUNTIME and owned(p, owner)]
    router = [p for p in pods if _component(p) == naming.COMPONENT_ROUTER]
    needed = [*needed_secrets(owner.spec), *cache_secrets(owner.spec)] if owner.spec else []
    secrets = await asyncio.gather(*(api.get("Secret", owner.namespace, secret.name) for secret in needed))
    lacks = [_lack(secret, found) for secret, found in zip(needed, secrets, strict=True)]
    whole = {need.field: raw for need, raw, lack in zip(needed, secrets, lacks, strict=True) if raw and not lack}
    to_workers, unusable = worker_client(owner, whole.get(WORKER_TLS_FIELD))
    return Observed(
        owner=owner,
        pods=tuple(PodView.from_raw(pod) for pod in runtime),
        router_pods=tuple(PodView.from_raw(pod) for pod in router),
        objects=objects,
        token=_token(objects.get(keys[0])),
        missing=tuple(text for text in lacks if text),
        unusable=(unusable,) if unusable else (),
        to_workers=to_workers,
    )


def worker_client(owner: LLMDeployment, secret: dict[str, Any] | None) -> tuple[WorkerClient | None, str]:
    """How to connect to `owner`'s workers by the Secret of spec.workerTLS, or a sentence that says why not.

    Routers and workers come to the same verdict, each by itself; here it is told once, where people look.
    """
    if secret is None or owner.spec is None or owner.spec.worker_tls is None:
        return None, ""
    name = worker_name(owner, owner.spec)
    try:
        entries = {entry: base64.b64decode(secret["data"][entry]) for entry in mutual_tls.ENTRIES}
        return WorkerClient(mutual_tls.ends_of(entries, name).router, name), ""
    except (TlsError, binascii.Error) as error:
        return None, f"the Secret {owner.spec.worker_tls.secret_name!r} of {WORKER_TLS_FIELD} cannot be used: {error}"


def _lack(secret: NeededSecret, raw: dict[str, Any] | None) -> str:
    """What is wrong with a Secret that somebody else makes; of its content nothing is kept."""
    if raw is None:
        return f"the Secret {secret.name!r} of {secret.field} does not exist"
    lacking = [entry for entry in secret.entries if entry not in raw.get("data", {})]
    return f"the Secret {secret.name!r} of {secret.field} has no entry {lacking[0]!r}" if lacking else ""


def _component(pod: dict[str, Any]) -> str:
    return str(pod["metadata"].get("labels", {}).get(naming.LABEL_COMPONENT, ""))


def _token(secret: dict[str, Any] | None) -> str | None:
    encoded = (secret or {}).get("data", {}).get("token", "")
    try:
        return base64.b64decode(encoded, validate=True).decode() or None
    except (binascii.Error, UnicodeDecodeError):
        return None
