"""The parts of Kubernetes' own types that an LLMDeployment embeds, and the units they are written in."""

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel

QUANTITY_PATTERN = r"^[0-9]+(\.[0-9]+)?(m|k|M|G|T|P|E|Ki|Mi|Gi|Ti|Pi|Ei)?$"
DURATION_PATTERN = r"^(0|([0-9]+(ms|s|m|h))+)$"

_SECONDS = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}


class CamelModel(BaseModel):
    """A type of the API: snake_case here, camelCase on the wire, unknown fields pruned."""

    model_config = ConfigDict(alias_generator=to_camel, validate_by_name=True, validate_by_alias=True, extra="ignore")

    def to_wire(self) -> dict[str, Any]:
        """The object as the API server stores it: camelCase keys, unset fields left out."""
        return self.model_dump(by_alias=True, exclude_none=True)


def parse_duration(text: str) -> float:
    """A duration in seconds: `1m30s` is 90.

    Raises:
        ValueError: the text is not a duration.
    """
    if not re.fullmatch(DURATION_PATTERN, text):
        raise ValueError(f"{text!r} is not a duration; write it like 30s, 5m or 1h30m")
    return sum(float(number) * _SECONDS[unit] for number, unit in re.findall(r"([0-9]+)(ms|s|m|h)", text))


Duration = Annotated[str, Field(pattern=DURATION_PATTERN, max_length=20)]
Quantity = Annotated[
    str | int,
    Field(
        json_schema_extra={
            "type": None,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "maxLength": 20,
            "pattern": QUANTITY_PATTERN,
            "x-kubernetes-int-or-string": True,
        }
    ),
]
IntOrPercent = Annotated[
    str | int,
    Field(
        json_schema_extra={
            "type": None,
            "anyOf": [{"type": "integer"}, {"type": "string"}],
            "minimum": 0,
            "pattern": "^(100|[1-9]?[0-9])%$",
            "x-kubernetes-int-or-string": True,
        }
    ),
]

# A type of Kubernetes' own that is handed on as it is; the API server checks it when a pod is made.
Embedded = dict[str, Any]
PRESERVE: dict[str, Any] = {"type": "object", "x-kubernetes-preserve-unknown-fields": True}


class LocalObjectReference(CamelModel):
    """A Secret in the same namespace."""

    name: str = Field(description="Name of the Secret.", min_length=1, max_length=253)


class ResourceRequirements(CamelModel):
    """What a container asks for and may use at most."""

    requests: dict[str, Quantity] | None = Field(
        None,
        description="What the scheduler reserves, like {cpu: 500m, memory: 1Gi}. Defaults to the limits.",
        max_length=8,
    )
    limits: dict[str, Quantity] | None = Field(
        None,
        description="What the container may use at most, like {memory: 16Gi, nvidia.com/gpu: 1}.",
        max_length=8,
    )


class Toleration(CamelModel):
    """Lets pods onto nodes with a taint that matches."""

    key: str | None = Field(None, description="The taint's key. Empty with operator Exists: every taint.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="How value is compared. Defaults to Equal.")
    value: str | None = Field(None, description="The taint's value, with operator Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="The taint's effect; all of them when empty."
    )
    toleration_seconds: int | None = Field(
        None, description="With effect NoExecute: seconds that a pod stays after the taint appears."
    )


class TopologySpreadConstraint(CamelModel):
    """How evenly runtime pods spread over the values of a node label."""

    max_skew: int = Field(description="How many pods two domains may differ by.", ge=1)
    topology_key: str = Field(description="Node label whose values are the domains.", min_length=1)
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(
        description="Whether an uneven pod waits (DoNotSchedule) or is placed all the same (ScheduleAnyway)."
    )
    min_domains: int | None = Field(None, description="Domains that must exist, with DoNotSchedule.", ge=1)
    label_selector: Embedded | None = Field(
        None,
        description="Pods that are counted. Defaults to the runtime pods of this LLMDeployment.",
        json_schema_extra=PRESERVE,
    )
