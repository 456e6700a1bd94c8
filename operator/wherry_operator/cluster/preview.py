"""What the operator would do about a manifest: the API server's dry run, then the same planner. Nothing is changed."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

import yaml

from wherry_operator.api.v1alpha1 import API_VERSION, KIND
from wherry_operator.cluster import snapshot
from wherry_operator.cluster.client import MERGE, Api, ApiError, path_of
from wherry_operator.planning.plan import make_plan
from wherry_operator.planning.types import Plan, Scale, Settings

LAST_APPLIED = "kubectl.kubernetes.io/last-applied-configuration"
MANAGER = "wherry-plan"


@dataclass(frozen=True)
class Preview:
    """The plan for one manifest, or the API server's refusal of it. `changes`: spec fields, before and after."""

    name: str
    namespace: str
    exists: bool = False
    refused: str = ""
    changes: tuple[tuple[str, Any, Any], ...] = ()
    plan: Plan | None = None


def manifests(text: str) -> Iterator[dict[str, Any]]:
    """The LLMDeployments in a file of YAML documents; other objects are left out.

    Raises:
        ValueError: the text is not YAML.
    """
    try:
        documents = list(yaml.safe_load_all(text))
    except yaml.YAMLError as error:
        raise ValueError(f"not YAML: {error}") from error
    for document in documents:
        if isinstance(document, dict) and (document.get("apiVersion"), document.get("kind")) == (API_VERSION, KIND):
            yield document


def three_way(last: Any, live: Any, new: Any) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that `kubectl apply` sends for a custom resource.

    What `new` has is set; what `last` (the manifest applied before) has and `new` has not is removed; what others added
    to `live` stays.
    """
    patch: dict[str, Any] = {}
    for key, value in new.items():
        old = (live or {}).get(key)
        if isinstance(value, dict) and isinstance(old, dict):
            if inner := three_way((last or {}).get(key) or {}, old, value):
                patch[key] = inner
        elif value != old:
            patch[key] = value
    gone = (key for key in last or {} if key not in new and key in (live or {}))
    return patch | dict.fromkeys(gone)


def differences(before: Any, after: Any, path: str = "spec") -> Iterator[tuple[str, Any, Any]]:
    """Each field that differs: its path, and its value before and after (None: it is not there)."""
    if isinstance(before, dict) and isinstance(after, dict):
        for key in sorted({*before, *after}):
            yield from differences(before.get(key), after.get(key), f"{path}.{key}")
    elif before != after:
        yield path, before, after


async def preview(api: Api, manifest: dict[str, Any], namespace: str, settings: Settings | None) -> Preview:
    """What applying `manifest` would lead to.

    Args:
        api: connected as the user.
        manifest: an LLMDeployment.
        namespace: used where the manifest names none.
        settings: the operator's; None takes those that the operator last wrote into the object's status.

    Raises:
        ApiError, Unavailable: the cluster cannot be read.
    """
    metadata = manifest.get("metadata") or {}
    namespace, name = metadata.get("namespace") or namespace, metadata.get("name", "")
    live = await api.get(KIND, namespace, name) if name else None
    try:
        raw = await _dry_run(api, manifest, live, namespace, name)
    except ApiError as error:
        if error.code in (400, 403, 404, 409, 422):
            return Preview(name, namespace, live is not None, _plainly(error.message))
        raise
    # Whether the budget leaves room for evictions depends on what the operator may see, not on what the user may.
    sees_nodes = ((raw.get("status") or {}).get("operator") or {}).get("seesNodes")
    observed = replace(await snapshot.read(api, raw), leaving_nodes={} if sees_nodes else None)
    owner = observed.owner
    replicas = owner.spec.fixed_replicas if owner.spec else 0
    if replicas is None and owner.spec and (scaling := owner.spec.scaling):
        now = owner.status.get("desiredReplicas") or 0
        replicas = min(max(now, scaling.min_replicas), scaling.max_replicas)
    ids = (f"new{index}" for index in itertools.count(1))
    plan = make_plan(
        observed, Scale(replicas or 0), settings or _settings(raw), datetime.now(UTC), "not made yet", lambda: next(ids)
    )
    changes = tuple(differences((live or {}).get("spec", {}), raw["spec"]))
    return Preview(name, namespace, live is not None, "", changes if live else (), plan)


async def _dry_run(
    api: Api, manifest: dict[str, Any], live: dict[str, Any] | None, namespace: str, name: str
) -> dict[str, Any]:
    query = {"dryRun": "All", "fieldValidation": "Strict", "fieldManager": MANAGER}
    if live is None:
        body = {**manifest, "metadata": {**(manifest.get("metadata") or {}), "namespace": namespace}}
        return await api.request("POST", path_of(KIND, namespace), body=body, query=query)
    noted = live["metadata"].get("annotations", {}).get(LAST_APPLIED)
    last = yaml.safe_load(noted) if noted else {}
    patch = three_way({"spec": last.get("spec")}, {"spec": live["spec"]}, {"spec": manifest.get("spec")})
    return await api.request("PATCH", path_of(KIND, namespace, name), body=patch, query=query, content_type=MERGE)


def _plainly(message: str) -> str:
    # For a patch the API server puts the whole object in front of what is wrong with it.
    _, strict, problem = message.rpartition("strict decoding error: ")
    return problem if strict else message


def _settings(raw: dict[str, Any]) -> Settings:
    wrote = (raw.get("status") or {}).get("operator") or {}
    settings = Settings()
    return Settings(
        render=type(settings.render)(
            wrote.get("runtimeImage", settings.render.runtime_image),
            wrote.get("routerImage", settings.render.router_image),
        )
    )
