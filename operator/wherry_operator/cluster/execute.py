"""Carries out a plan's actions, and writes the status."""

from collections.abc import Sequence
from typing import Any

from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentStatus
from wherry_operator.cluster.client import APPLY, JSON_PATCH, MERGE, STRATEGIC, Api, ApiError, path_of
from wherry_operator.desired.common import MANAGER
from wherry_operator.metrics import ACTIONS
from wherry_operator.planning.types import Action, Refusal

# Answers that say "not like this": repeating the request unchanged will not help, so a person has to know.
REFUSED = (400, 403, 405, 413, 422)
# Answers that say "the snapshot was out of date": the next one will be better.
STALE = (404, 409)
# Patches name the uid that they are for; another object by that name is answered with 422 (uid is immutable).
GUARDED = ("annotate", "condition")


class StaleError(Exception):
    """The cluster changed under the plan; look again."""


async def execute(api: Api, owner: LLMDeployment, actions: Sequence[Action]) -> tuple[list[Action], list[Refusal]]:
    """Carries out `actions` in order. Returns those done and those refused; more of a refused kind are not tried.

    Raises:
        StaleError: an object was changed or is gone; the rest was not tried.
        ApiError, Unavailable, LostLeadership: as from the API client.
    """
    done: list[Action] = []
    refused: list[Refusal] = []
    for action in actions:
        if any((r.action.verb, r.action.kind) == (action.verb, action.kind) for r in refused):
            continue
        try:
            await _perform(api, owner, action)
        except ApiError as error:
            ACTIONS.labels(action.verb, action.kind, str(error.code)).inc()
            if error.code in STALE or (error.code == 422 and action.verb in GUARDED):
                raise StaleError(f"{action.verb} {action.kind} {action.name}: {error}") from error
            if error.code in REFUSED:
                refused.append(Refusal(action, error.code, error.message))
            else:
                raise
        else:
            ACTIONS.labels(action.verb, action.kind, "ok").inc()
            done.append(action)
    return done, refused


async def _perform(api: Api, owner: LLMDeployment, action: Action) -> None:
    metadata: dict[str, Any]
    path = path_of(action.kind, owner.namespace, action.name)
    if action.verb == "create":
        collection = path_of(action.kind, owner.namespace)
        await api.request("POST", collection, body=action.body, query={"fieldManager": MANAGER})
    elif action.verb == "apply":
        query = {"fieldManager": MANAGER, "force": "true"}
        await api.request("PATCH", path, body=action.body, query=query, content_type=APPLY)
    elif action.verb == "delete":
        body = {"preconditions": {"uid": action.uid}, "propagationPolicy": "Background"}
        try:
            await api.request("DELETE", path, body=body)
        except ApiError as error:
            if error.code != 404:
                raise
    elif action.verb == "annotate":
        metadata = {"uid": action.uid, "annotations": action.body}
        await api.request(
            "PATCH", path, body={"metadata": metadata}, query={"fieldManager": MANAGER}, content_type=MERGE
        )
    elif action.verb == "condition":
        # Conditions merge by their type, so those of the kubelet stay.
        body = {"metadata": {"uid": action.uid}, "status": {"conditions": [action.body]}}
        query = {"fieldManager": MANAGER}
        await api.request("PATCH", f"{path}/status", body=body, query=query, content_type=STRATEGIC)
    else:
        # The resource version keeps two writers of the list from undoing one another.
        metadata = {
            "finalizers": list(action.finalizers),
            "resourceVersion": owner.resource_version,
            "uid": owner.uid,
        }
        query = {"fieldManager": MANAGER}
        await api.request("PATCH", path, body={"metadata": metadata}, query=query, content_type=MERGE)


async def write_status(api: Api, owner: LLMDeployment, status: LLMDeploymentStatus) -> bool:
    """Writes the status if it differs from what the object has; says whether it did.

    Raises:
        StaleError: the object is gone, or another one has its name now.
    """
    wire = status.to_wire()
    if wire == owner.status:
        return False
    patch = [
        {"op": "test", "path": "/metadata/uid", "value": owner.uid},
        {"op": "add", "path": "/status", "value": wire},
    ]
    path = path_of("LLMDeployment", owner.namespace, owner.name, "status")
    try:
        await api.request("PATCH", path, body=patch, query={"fieldManager": MANAGER}, content_type=JSON_PATCH)
    except ApiError as error:
        if error.code in (*STALE, 422):
            raise StaleError(f"status of {owner.name}: {error}") from error
        raise
    return True
