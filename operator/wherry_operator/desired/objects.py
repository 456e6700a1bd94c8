"""Everything that should exist for one LLMDeployment. Pure: the token comes from outside."""

from dataclasses import dataclass
from typing import Any

from wherry_operator.api.resource import InvalidSpecError, LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_operator.desired.common import RenderSettings, metadata, token_secret_name
from wherry_operator.desired.disruption import budgets
from wherry_operator.desired.router import router_objects
from wherry_operator.desired.runtime import pod_template, revision_of
from wherry_protocol import naming


@dataclass(frozen=True)
class Desired:
    """`applied` are kept as they are here; the Secret is made once and then left alone."""

    template: dict[str, Any]
    revision: str
    applied: tuple[dict[str, Any], ...]
    secret: dict[str, Any]


def render(
    owner: LLMDeployment, settings: RenderSettings, token: str, replicas: int | None = None, *, moves: bool = True
) -> Desired:
    """The objects for `owner`.

    Args:
        owner: the LLMDeployment.
        settings: the operator's.
        token: the one in its Secret, or a new one where there is none yet.
        replicas: groups that are wanted; None takes the spec's number, or the lowest that its scaling allows.
        moves: whether the operator sees which nodes are being emptied.

    Raises:
        InvalidSpecError: the spec cannot be turned into objects; the text says why.
    """
    if owner.spec is None:
        raise InvalidSpecError(owner.spec_error)
    template = pod_template(owner, owner.spec, settings, token)
    return Desired(
        template=template,
        revision=revision_of(template),
        applied=(
            *budgets(owner, owner.spec, _wanted(owner.spec) if replicas is None else replicas, moves=moves),
            *router_objects(owner, owner.spec, settings, token),
        ),
        secret={
            "apiVersion": "v1",
            "kind": "Secret",
            "type": "Opaque",
            "metadata": metadata(owner, token_secret_name(owner), naming.COMPONENT_RUNTIME),
            "stringData": {"token": token},
        },
    )


def _wanted(spec: LLMDeploymentSpec) -> int:
    return spec.scaling.min_replicas if spec.scaling else spec.fixed_replicas or 0
