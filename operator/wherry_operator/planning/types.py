"""The planner's vocabulary."""

import ssl
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.v1alpha1 import PendingAction
from wherry_operator.desired.common import RenderSettings
from wherry_operator.planning.pods import PodView
from wherry_protocol.router_report import RouterReport

Verb = Literal["create", "apply", "delete", "finalizers", "annotate", "condition"]


@dataclass(frozen=True)
class Action:
    """One write to the API server.

    `create` and `apply` carry the object in `body`; `delete` names it and its `uid`; `finalizers` sets the
    LLMDeployment's own finalizers to `finalizers`. `annotate` sets the annotations in `body` (None removes one) and
    `condition` the one condition in `body`, both of the object with that `uid` and of no other. `event`: the reason of
    the Event that tells of it, where the verb alone would not say enough.
    """

    verb: Verb
    kind: str
    name: str
    reason: str
    body: dict[str, Any] | None = field(default=None, repr=False)
    uid: str = ""
    finalizers: tuple[str, ...] = ()
    event: str = ""


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


class WorkerClient(NamedTuple):
    """How to connect to workers with mutual TLS: a client's context, and the name in their certificates."""

    context: ssl.SSLContext
    server_name: str


@dataclass(frozen=True)
class Observed:
    """An exact snapshot of what exists for one LLMDeployment.

    `pods` run the model; those with `lost_because` are on `lost_nodes`, where nothing may be put. `live_nodes` are seen
    to live. `isolated`: why the operator trusts its own view of nodes no longer and holds none for lost; empty if it
    does. `objects` are the raw children other than pods, by (kind, name); they may be someone else's. `token` is None
    where there is no Secret. `reports` are what routers answered, by their pods' uid; those that were not asked are
    missing too. `leaving_nodes` are being emptied, each with the words that say so; None where the operator may not see
    nodes. `missing`: for each Secret that the spec names and that is not there or lacks an entry, a sentence that says
    so; `unusable`: the same where its content cannot be used. `to_workers`: what workers with mutual TLS are shown.
    """

    owner: LLMDeployment
    pods: tuple[PodView, ...] = ()
    router_pods: tuple[PodView, ...] = ()
    objects: dict[tuple[str, str], dict[str, Any]] = field(default_factory=dict)
    token: str | None = None
    lost_nodes: tuple[str, ...] = ()
    live_nodes: frozenset[str] = frozenset()
    isolated: str = ""
    reports: dict[str, RouterReport] = field(default_factory=dict)
    leaving_nodes: dict[str, str] | None = None
    missing: tuple[str, ...] = ()
    unusable: tuple[str, ...] = ()
    to_workers: WorkerClient | None = field(default=None, repr=False)

    @property
    def shunned_nodes(self) -> tuple[str, ...]:
        """Where no pod may be put now: lost nodes, and those that are being emptied, whatever the pod tolerates."""
        return (*self.lost_nodes, *sorted((self.leaving_nodes or {}).keys() - set(self.lost_nodes)))

    @property
    def open_nodes(self) -> frozenset[str]:
        """Nodes that show life and may be used."""
        return self.live_nodes - (self.leaving_nodes or {}).keys()


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
