"""Which of the objects other than pods differ from what they should be. Pure."""

from typing import Any

from wherry_operator.api.resource import LLMDeployment
from wherry_operator.desired.common import ANNOTATION_APPLIED
from wherry_operator.desired.objects import Desired
from wherry_operator.planning.types import Action, Observed, Problem
from wherry_protocol.quantity import parse_quantity

# Deleted in this order: first what serves, last what it needs.
TEARDOWN_ORDER = (
    "PodDisruptionBudget",
    "Deployment",
    "Service",
    "RoleBinding",
    "Role",
    "ServiceAccount",
    "ControllerRevision",
    "Secret",
)
# Of these some are wanted only at times.
OPTIONAL = ("PodDisruptionBudget",)


def owned(raw: dict[str, Any], owner: LLMDeployment) -> bool:
    """Whether `owner` controls the object."""
    references = raw["metadata"].get("ownerReferences", [])
    return any(reference.get("uid") == owner.uid for reference in references)


def name_conflict(desired: Desired, observed: Observed) -> Problem | None:
    """An object that is in the way: it has a name that Wherry needs, and is someone else's."""
    for body in (*desired.applied, desired.secret):
        key = (body["kind"], body["metadata"]["name"])
        if (raw := observed.objects.get(key)) and not owned(raw, observed.owner):
            message = (
                f"the {key[0]} {key[1]!r} exists and does not belong to this LLMDeployment; delete it, or give the "
                "LLMDeployment another name"
            )
            return Problem("NameConflict", message)
    secret = observed.objects.get(("Secret", desired.secret["metadata"]["name"]))
    if secret is not None and observed.token is None:
        name = desired.secret["metadata"]["name"]
        return Problem("TokenMissing", f"the Secret {name!r} has no key 'token'; delete it and a new one is made")
    return None


def object_actions(desired: Desired, observed: Observed) -> list[Action]:
    """Creates the Secret where there is none, applies every other object that is missing or differs, and deletes those
    that are not wanted any more."""
    actions = []
    secret = desired.secret["metadata"]["name"]
    if ("Secret", secret) not in observed.objects:
        actions.append(Action("create", "Secret", secret, "it does not exist", body=desired.secret))
    for body in desired.applied:
        kind, name = body["kind"], body["metadata"]["name"]
        if reason := difference(body, observed.objects.get((kind, name))):
            actions.append(Action("apply", kind, name, reason, body=body))
    wanted = {(body["kind"], body["metadata"]["name"]) for body in desired.applied}
    for (kind, name), raw in sorted(observed.objects.items()):
        if kind in OPTIONAL and (kind, name) not in wanted and owned(raw, observed.owner):
            actions.append(Action("delete", kind, name, "it is not wanted any more", uid=raw["metadata"]["uid"]))
    return actions


def difference(desired: dict[str, Any], raw: dict[str, Any] | None) -> str:
    """Why the object has to be applied; empty if it need not be.

    The stamped hash tells of changes in what is wanted (removed fields too); the comparison tells of changes that
    someone made to the object. Fields that are only in `raw` are the API server's defaults.
    """
    if raw is None:
        return "it does not exist"
    stamp = desired["metadata"]["annotations"][ANNOTATION_APPLIED]
    if raw["metadata"].get("annotations", {}).get(ANNOTATION_APPLIED) != stamp:
        return "what is wanted of it changed"
    path = _first_difference({k: v for k, v in desired.items() if k not in ("apiVersion", "kind")}, raw, "")
    return f"{path} was changed by someone else" if path else ""


def _first_difference(wanted: Any, actual: Any, path: str) -> str:
    if isinstance(wanted, dict):
        if not isinstance(actual, dict):
            return "" if not wanted and actual is None else path
        parts = (_first_difference(value, actual.get(key), f"{path}.{key}") for key, value in wanted.items())
        return next((part for part in parts if part), "")
    if isinstance(wanted, list):
        if not isinstance(actual, list) or len(wanted) != len(actual):
            return "" if not wanted and actual is None else path
        pairs = enumerate(zip(wanted, actual, strict=True))
        return next((p for i, (w, a) in pairs if (p := _first_difference(w, a, f"{path}[{i}]"))), "")
    return "" if wanted == actual or _same_quantity(wanted, actual) else path


def _same_quantity(wanted: Any, actual: Any) -> bool:
    # The API server writes quantities its own way: 1000m comes back as 1.
    try:
        return parse_quantity(wanted) == parse_quantity(actual)
    except ValueError:
        return False


def teardown_actions(observed: Observed) -> list[Action]:
    """Deletes every object that belongs to the LLMDeployment and is not on its way out yet."""
    return [
        Action("delete", kind, name, "the LLMDeployment is being deleted", uid=raw["metadata"]["uid"])
        for wanted in TEARDOWN_ORDER
        for (kind, name), raw in sorted(observed.objects.items())
        if kind == wanted and owned(raw, observed.owner) and "deletionTimestamp" not in raw["metadata"]
    ]
