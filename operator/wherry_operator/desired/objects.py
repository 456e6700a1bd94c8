"""Everything that should exist for one LLMDeployment. Pure: the token comes from outside."""

from dataclasses import dataclass
from typing import Any

from wherry_operator.api.resource import InvalidSpecError, LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_operator.desired.common import RenderSettings, metadata, token_secret_name
from wherry_operator.desired.disruption import budgets
from wherry_operator.desired.router import router_objects, router_template
from wherry_operator.desired.runtime import pod_template, revision_of
from wherry_protocol import naming


@dataclass(frozen=True)
class Templates:
    """What pods are made from. `revision` is the name that the runtime's pods carry."""

    revision: str
    runtime: dict[str, Any]
    router: dict[str, Any]


@dataclass(frozen=True)
class Desired:
    """`applied` are kept as they are here; the Secret is made once and then left alone."""

    template: dict[str, Any]
    revision: str
    applied: tuple[dict[str, Any], ...]
    secret: dict[str, Any]


def spec_of(owner: LLMDeployment) -> LLMDeploymentSpec:
    """The spec.

    Raises:
        InvalidSpecError: it cannot be read; the text says why.
    """
    if owner.spec is None:
        raise InvalidSpecError(owner.spec_error)
    return owner.spec


def templates(owner: LLMDeployment, settings: RenderSettings, token: str) -> Templates:
    """What this operator makes pods from for `owner`, whatever they were made from before.

    Raises:
        InvalidSpecError: the spec cannot be turned into objects; the text says why.
    """
    spec = spec_of(owner)
    runtime = pod_template(owner, spec, settings, token)
    return Templates(revision_of(runtime), runtime, router_template(owner, spec, settings, token))


def render(
    owner: LLMDeployment,
    settings: RenderSettings,
    token: str,
    replicas: int | None = None,
    *,
    moves: bool = True,
    kept: Templates | None = None,
) -> Desired:
    """The objects for `owner`.

    Args:
        owner: the LLMDeployment.
        settings: the operator's.
        token: the one in its Secret, or a new one where there is none yet.
        replicas: groups that are wanted; None takes the spec's number, or the lowest that its scaling allows.
        moves: whether the operator sees which nodes are being emptied.
        kept: the templates to make pods from, where they are not those of today.

    Raises:
        InvalidSpecError: the spec cannot be turned into objects; the text says why.
    """
    spec = spec_of(owner)
    used = kept or templates(owner, settings, token)
    wanted = _lowest(spec) if replicas is None else replicas
    return Desired(
        template=used.runtime,
        revision=used.revision,
        applied=(*budgets(owner, spec, wanted, moves=moves), *router_objects(owner, spec, used.router)),
        secret={
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": metadata(owner, token_secret_name(owner), naming.COMPONENT_RUNTIME),
            "stringData": {"token": token},
        },
    )


def _lowest(spec: LLMDeploymentSpec) -> int:
    return spec.scaling.min_replicas if spec.scaling else spec.fixed_replicas or 0
