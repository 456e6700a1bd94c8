"""What pods are made from stays as it is until somebody asks for something else, whichever operator looks. Pure.

Each revision is recorded, as a ControllerRevision: the spec that was asked for and the templates made from it. A record
holds while the operator of today would make the same templates from the spec of then as from the spec of now: so only
what people change makes a new revision, and never what a newer operator adds to its templates, a new field's default,
or another default image. Pods that come later are made from the recorded templates as well, so the replicas of a
revision are alike. See docs/adr/0007-revisions.md.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import ValidationError

from wherry_operator.api.resource import InvalidSpecError, LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_operator.desired.common import (
    ANNOTATION_ROLLOUT,
    RenderSettings,
    digest,
    metadata,
    router_name,
)
from wherry_operator.desired.objects import Templates, spec_of, templates
from wherry_operator.planning.objects import owned
from wherry_operator.planning.types import Action, Observed
from wherry_protocol import naming

KIND = "ControllerRevision"


@dataclass(frozen=True)
class Record:
    """One revision as it was recorded. `asked`: the spec, the token's hash and the rollout that it was made for."""

    name: str
    uid: str
    number: int
    asked: dict[str, Any]
    made: Templates

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> "Record | None":
        """The record in a ControllerRevision; None if there is none that this operator can read."""
        data = raw.get("data") or {}
        asked, made = data.get("asked"), data.get("made")
        if not isinstance(asked, dict) or not isinstance(made, dict):
            return None
        parts = (made.get("revision"), made.get("runtime"), made.get("router"))
        if not (isinstance(parts[0], str) and isinstance(parts[1], dict) and isinstance(parts[2], dict)):
            return None
        kept = Templates(parts[0], parts[1], parts[2])
        return cls(raw["metadata"]["name"], raw["metadata"]["uid"], int(raw.get("revision", 0)), asked, kept)


@dataclass(frozen=True)
class Choice:
    """The templates to use, and the writes that keep the records right."""

    templates: Templates
    actions: tuple[Action, ...] = ()


def choose(observed: Observed, settings: RenderSettings, token: str) -> Choice:
    """The templates that pods are made from now.

    Raises:
        InvalidSpecError: the spec cannot be turned into objects; the text says why.
    """
    owner = observed.owner
    raws = [raw for (kind, _), raw in observed.objects.items() if kind == KIND and owned(raw, owner)]
    records = sorted((r for raw in raws if (r := Record.from_raw(raw))), key=lambda r: -r.number)
    fresh, asked = templates(owner, settings, token), _asked(owner, token)
    used, record = _holding(records, owner, asked, fresh, settings, token)
    if used is None:
        used = fresh if records else _adopted(observed, fresh)
    actions = []
    name = record.name if record else _name(owner, asked, used)
    if record is None:
        number = max((r.number for r in records), default=0) + 1
        body = _body(owner, name, number, asked, used)
        actions.append(Action("create", KIND, name, f"revision {used.revision} begins", body=body))
    return Choice(used, (*actions, *_outlived(observed, records, name, used.revision)))


def _asked(owner: LLMDeployment, token: str) -> dict[str, Any]:
    rollout = owner.annotations.get(ANNOTATION_ROLLOUT, "")
    return {"spec": spec_of(owner).to_wire(), "token": digest(token), "rollout": rollout}


def _holding(
    records: Sequence[Record],
    owner: LLMDeployment,
    asked: dict[str, Any],
    fresh: Templates,
    settings: RenderSettings,
    token: str,
) -> tuple[Templates | None, Record | None]:
    """The templates that hold, and the record that has them as they are.

    A router whose template changed alone gets a new one, and the runtime keeps its own; a new runtime brings a new
    router along, so that the two are never further apart than one change.
    """
    runtime: Record | None = None
    for record in records:
        if record.asked == asked:
            return record.made, record
        then = _as_made_today(record, owner, settings, token)
        if then is None or any(record.asked.get(key) != asked[key] for key in ("token", "rollout")):
            continue
        if then.runtime == fresh.runtime:
            if then.router == fresh.router:
                return record.made, record
            runtime = runtime or record
    return (replace(runtime.made, router=fresh.router), None) if runtime else (None, None)


def _as_made_today(record: Record, owner: LLMDeployment, settings: RenderSettings, token: str) -> Templates | None:
    """What the operator of today makes from the spec of then; None where it cannot read that any more."""
    try:
        spec = LLMDeploymentSpec.model_validate(record.asked.get("spec"))
        return templates(replace(owner, spec=spec), settings, token)
    except (ValidationError, InvalidSpecError):
        return None


def _adopted(observed: Observed, fresh: Templates) -> Templates:
    """What runs already, made by an operator that kept no records: it stays, if it is what was asked for last."""
    owner = observed.owner
    if owner.status.get("observedGeneration") != owner.generation:
        return fresh
    revision = owner.status.get("revision") or ""
    found = any(pod.revision == revision and not pod.deleting for pod in observed.pods)
    kept = replace(fresh, revision=revision) if found else fresh
    deployment = observed.objects.get(("Deployment", router_name(owner)))
    if deployment is None or not owned(deployment, owner):
        return kept
    return replace(kept, router=_without_nulls(deployment["spec"]["template"]))


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(entry) for key, entry in value.items() if entry is not None}
    return [_without_nulls(entry) for entry in value] if isinstance(value, list) else value


def _name(owner: LLMDeployment, asked: dict[str, Any], used: Templates) -> str:
    return f"{owner.name}-{digest([asked, used.revision, used.runtime, used.router])}"


def _body(owner: LLMDeployment, name: str, number: int, asked: dict[str, Any], used: Templates) -> dict[str, Any]:
    meta = metadata(owner, name, naming.COMPONENT_RUNTIME)
    meta["labels"] |= {naming.LABEL_REVISION: used.revision}
    made = {"revision": used.revision, "runtime": used.runtime, "router": used.router}
    data = {"asked": asked, "made": made}
    return {"apiVersion": "apps/v1", "kind": KIND, "metadata": meta, "revision": number, "data": data}


def _outlived(observed: Observed, records: Iterable[Record], current: str, revision: str) -> list[Action]:
    """Deletes records that nothing is made from any more; those of pods that still exist stay, for an edit may be
    reverted midway."""
    alive = {pod.revision for pod in observed.pods if not pod.deleting} - {revision}
    return [
        Action("delete", KIND, record.name, "nothing is made from it any more", uid=record.uid)
        for record in records
        if record.name != current and record.made.revision not in alive
    ]
