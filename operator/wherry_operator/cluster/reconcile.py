"""One look at one LLMDeployment: read, decide, act, say. The only place where the four meet."""

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from wherry_operator.api.conditions import DEGRADED
from wherry_operator.api.kube import parse_duration
from wherry_operator.api.v1alpha1 import LLMDeploymentStatus
from wherry_operator.autoscaling.decide import Recommendation, decide
from wherry_operator.cluster import load, routers, snapshot
from wherry_operator.cluster.client import Api
from wherry_operator.cluster.events import EventRecorder
from wherry_operator.cluster.execute import execute, write_status
from wherry_operator.cluster.nodes import Nodes
from wherry_operator.cluster.probes import Prober
from wherry_operator.planning.downloads import with_downloads
from wherry_operator.planning.failover import with_verdict
from wherry_operator.planning.group import ready_leaders
from wherry_operator.planning.plan import make_plan
from wherry_operator.planning.quality import with_qualities
from wherry_operator.planning.routers import live_routers, worth_asking
from wherry_operator.planning.status import make_status
from wherry_operator.planning.types import Action, Observed, Plan, Refusal, Scale, Settings

logger = logging.getLogger("wherry.operator")

# No vowels, so that no words appear in names.
ALPHABET = "bcdfghjkmnpqrstvwxz2456789"
TOKEN_BYTES = 32
SCALING_INTERVAL_S = 5.0
REFUSED_RETRY_S = 15.0
AFTER_ACTION_S = 2.0
PAST = {"create": "Created", "apply": "Applied", "delete": "Deleted"}


@dataclass(frozen=True)
class Key:
    """Which LLMDeployment."""

    namespace: str
    name: str


def new_group() -> str:
    """A group id that is not in use, as good as surely; creating a pod whose name is taken fails and is tried anew."""
    return "".join(secrets.choice(ALPHABET) for _ in range(5))


class Reconciler:
    """Brings LLMDeployments to what their spec says.

    Holds no state that it could not lose: the autoscaler's history, what `nodes` follows and what `prober` saw last.
    """

    def __init__(self, api: Api, settings: Settings, clock: Callable[[], datetime] = lambda: datetime.now(UTC)) -> None:
        self._api = api
        self._settings = settings
        self._clock = clock
        self._events = EventRecorder(api)
        self.nodes = Nodes(api)
        self.prober: Prober[Key] = Prober(api, self.nodes)
        self._history: dict[str, tuple[Recommendation, ...]] = {}

    async def reconcile(self, key: Key) -> float | None:
        """One pass. Returns the seconds after which to look again though nothing happened, or None.

        Raises:
            StaleError, ApiError, Unavailable, LostLeadership: try again later.
        """
        raw = await self._api.get("LLMDeployment", key.namespace, key.name)
        if raw is None:
            self.prober.forget(key)
            return None
        observed = self._look_around(key, await snapshot.read(self._api, raw))
        scale = await self._scale(observed)
        observed = await self._ask_routers(observed, scale)
        now = self._clock()
        plan = make_plan(observed, scale, self._settings, now, secrets.token_urlsafe(TOKEN_BYTES), new_group)
        done, refused = await execute(self._api, observed.owner, plan.actions)
        if observed.owner.deleting and any(action.verb == "finalizers" for action in done):
            self._history.pop(observed.owner.uid, None)
            return None
        status = make_status(plan, self._settings, now, refused)
        await write_status(self._api, observed.owner, status)
        await self._tell(observed, status, done, refused)
        return self._again(plan, refused)

    def _look_around(self, key: Key, observed: Observed) -> Observed:
        """Tells the prober what is there, and adds what is known of nodes."""
        if spec := observed.owner.spec:
            patience = parse_duration(spec.failover.node_unreachable)
            self.prober.watch(key, observed.pods, observed.router_pods, patience)
        observed = with_qualities(with_downloads(observed, self.prober.downloads), self.prober.qualities)
        return with_verdict(replace(observed, leaving_nodes=self.nodes.leaving()), self.prober.verdict)

    async def _ask_routers(self, observed: Observed, scale: Scale) -> Observed:
        if not worth_asking(observed, scale.replicas):
            return observed
        return replace(observed, reports=await routers.poll(live_routers(observed), observed.token))

    def _again(self, plan: Plan, refused: list[Refusal]) -> float | None:
        waits = [plan.retry_after] if plan.retry_after is not None else []
        if refused:
            waits.append(REFUSED_RETRY_S)
        elif plan.actions:
            # The events of what was just done ask for it sooner; this is for when they do not come.
            waits.append(AFTER_ACTION_S)
        if plan.scale.active is not None:
            waits.append(SCALING_INTERVAL_S)
        return min(waits, default=None)

    async def _scale(self, observed: Observed) -> Scale:
        owner = observed.owner
        before = owner.status.get("desiredReplicas")
        if owner.spec is None or owner.deleting:
            return Scale(before or 0)
        if (scaling := owner.spec.scaling) is None:
            return Scale(owner.spec.fixed_replicas or 0)
        current = before if before is not None else scaling.min_replicas
        signals, reports = await asyncio.gather(
            load.poll(ready_leaders(observed.pods), observed.token, observed.to_workers),
            routers.poll(live_routers(observed), observed.token),
        )
        queued = sum(report.queued for report in reports.values())
        now = self._clock()
        # After a restart the number that runs counts as recommended, so that it does not drop for lack of memory.
        history = self._history.get(owner.uid) or (Recommendation(now, current),)
        decision = decide(scaling, current, signals, history, now, queued)
        self._history[owner.uid] = decision.history
        return Scale(decision.replicas, decision.reason, decision.message, decision.active)

    async def _tell(
        self, observed: Observed, status: LLMDeploymentStatus, done: list[Action], refused: list[Refusal]
    ) -> None:
        """Events for what was done, and for trouble that is new."""
        owner = observed.owner
        told = [("Normal", *_told(action)) for action in done if action.event or action.verb in PAST]
        for *_, message in told:
            logger.info("%s/%s: %s", owner.namespace, owner.name, message)
        for condition in status.conditions or []:
            if condition.type == DEGRADED and condition.status == "True":
                told.append(("Warning", condition.reason, condition.message))
        await asyncio.gather(*(self._events.post(owner, *entry) for entry in told))


def _told(action: Action) -> tuple[str, str]:
    """The reason and the message of the Event about something that was done."""
    if action.event:
        return action.event, f"{action.kind} {action.name}: {action.reason}"
    return PAST[action.verb] + action.kind, f"{PAST[action.verb]} {action.kind} {action.name}: {action.reason}"
