"""The planner's vocabulary."""

from dataclasses import dataclass, field
from typing import Any, Literal

from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.v1alpha1 import PendingAction
from wherry_operator.desired.common import RenderSettings
from wherry_operator.planning.pods import PodView

Verb = Literal["create", "apply", "delete", "finalizers"]


@dataclass(frozen=True)
class Action:
    """One write to the API server.

    `create` and `apply` carry the object in `body`; `delete` names it and its `uid`; `finalizers` sets the
    LLMDeployment's own finalizers to `finalizers`.
    """

    verb: Verb
    kind: str
    name: str
    reason: str
    body: dict[str, Any] | None = field(default=None, repr=False)
    uid: str = ""
    finalizers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refusal:
    """A write that the API server refused. `code` is the HTTP status."""

    action: Action
    code: int
    message: str


@dataclass(frozen=True)
class Scale:
    """How many replicas should run. `active` is None where scaling is off, else whether it has what it needs."""

    replicas: int
    reason: str = ""
    message: str = ""
    active: bool | None = None


@dataclass(frozen=True)
class Observed:
    """An exact snapshot of what exists for one LLMDeployment.

    `pods` run the model. `objects` are the raw children other than pods, by (kind, name); they may belong to someone
    else. `token` is None where there is no Secret.
    """

    owner: LLMDeployment
    pods: tuple[PodView, ...] = ()
    router_pods: tuple[PodView, ...] = ()
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    token: str | None = None


@dataclass(frozen=True)
class Settings:
    """The operator's settings that a plan depends on."""

    render: RenderSettings = field(default_factory=RenderSettings)
    service_url: Literal["dns", "ip"] = "dns"
    version: str = "0"


@dataclass(frozen=True)
class Problem:
    """Why nothing can be planned: the spec is unusable, or a name is taken."""

    reason: str
    message: str


@dataclass(frozen=True)
class Plan:
    """What to do now, in this order, and what has to wait.

    `problem`: why nothing can be done; pods are left as they are. `settled`: nothing is left to do. `retry_after`:
    seconds until time alone changes the plan; None if it never does.
    """

    observed: Observed
    scale: Scale
    revision: str = ""
    actions: tuple[Action, ...] = ()
    pending: tuple[PendingAction, ...] = ()
    problem: Problem | None = None
    retry_after: float | None = None

    @property
    def settled(self) -> bool:
        """Whether everything is as it should be."""
        return not (self.actions or self.pending or self.problem)
