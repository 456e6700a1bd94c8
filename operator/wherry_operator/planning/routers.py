"""What the routers know of a group, and whether that opens its pods' readiness gate. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from wherry_operator.api.v1alpha1 import PendingAction
from wherry_operator.planning.group import GroupView
from wherry_operator.planning.pods import PodView
from wherry_operator.planning.types import Action, Observed
from wherry_protocol import naming
from wherry_protocol.router_report import RouterReport

# While a pod waits to be known, routers are asked this often.
POLL_S = 0.5
# Routers that run and answer nothing for so long (an older version, a network policy in the way) stop no rollout.
SILENT_S = 30.0


@dataclass(frozen=True)
class Routers:
    """The routers that may have streams: how many there are, and what those that answered said, by the pod's uid.

    A router that is shutting down counts: it finishes its streams. One without a running container has none.
    """

    uids: tuple[str, ...] = ()
    reports: tuple[RouterReport, ...] = ()

    @property
    def silent(self) -> int:
        """How many of them did not answer, or were not asked."""
        return len(self.uids) - len(self.reports)

    def about(self, group: GroupView) -> "Knowledge":
        """All that is known of a group; routers know a group by its pod 0."""
        leader = group.pods[0]
        name = f"{leader.name}/{leader.uid}"
        found = [replica for report in self.reports for replica in report.replicas if replica.name == name]
        idle = all(replica.state == "draining" and replica.in_flight == 0 for replica in found)
        return Knowledge(bool(found), sum(replica.in_flight for replica in found), idle and not self.silent)


@dataclass(frozen=True)
class Knowledge:
    """`known`: a router names the group. `in_flight`: its requests, as far as routers answered. `free`: every router
    answered, and none has or will have a request there."""

    known: bool
    in_flight: int
    free: bool


def live_routers(observed: Observed) -> tuple[PodView, ...]:
    """The router pods that can be asked: their container runs, and their node is not lost."""
    running = (pod for pod in observed.router_pods if pod.ip and pod.container.started and not pod.lost)
    return tuple(pod for pod in running if pod.node not in observed.lost_nodes)


def routers_of(observed: Observed) -> Routers:
    """The routers together with what they answered."""
    uids = tuple(pod.uid for pod in live_routers(observed))
    return Routers(uids, tuple(observed.reports[uid] for uid in uids if uid in observed.reports))


def worth_asking(observed: Observed, replicas: int) -> bool:
    """Whether a plan for so many replicas depends on what routers say."""
    pods = [pod for pod in observed.pods if not pod.deleting and not observed.owner.deleting]
    waits = any(pod.drain or (pod.gated and pod.containers_ready) for pod in pods)
    return waits or len({pod.group or pod.name for pod in pods}) > replicas


@dataclass(frozen=True)
class GatePlan:
    """Gates to open now, what waits, and when to look again."""

    actions: tuple[Action, ...] = ()
    pending: tuple[PendingAction, ...] = ()
    retry_after: float | None = None


def plan_gates(groups: Sequence[GroupView], routers: Routers, now: datetime) -> GatePlan:
    """Opens the gate of each group whose containers are ready and that a router knows.

    Without a router nobody could know it, and nobody has a stream to lose: the gate opens. Where every router is silent
    it opens after `SILENT_S`. Routers that answer and do not know the group are believed.
    """
    actions: list[Action] = []
    pending: list[PendingAction] = []
    for group in groups:
        shut = [pod for pod in group.pods if pod.gated and not pod.deleting]
        since = [pod.containers_ready for pod in group.pods if pod.containers_ready]
        if not shut or not group.whole or len(since) < len(group.pods):
            continue
        waited = now - max(since)
        if reason := _opens(group, routers, waited):
            actions += [_open(pod, reason, now) for pod in shut]
        else:
            why = "its containers are ready; no router knows it yet"
            pending.append(PendingAction(action="Wait", target=group.name, reason=why))
    return GatePlan(tuple(actions), tuple(pending), POLL_S if pending else None)


def _opens(group: GroupView, routers: Routers, waited: timedelta) -> str:
    if not routers.uids:
        return "NoRouter"
    if routers.about(group).known:
        return "KnownToRouter"
    if not routers.reports and waited.total_seconds() >= SILENT_S:
        return "RoutersSilent"
    return ""


def _open(pod: PodView, reason: str, now: datetime) -> Action:
    messages = {
        "NoRouter": "no router runs",
        "KnownToRouter": "a router knows it",
        "RoutersSilent": f"no router answered for {SILENT_S:.0f} s",
    }
    condition = {
        "type": naming.GATE_ROUTABLE,
        "status": "True",
        "reason": reason,
        "message": messages[reason],
        "lastTransitionTime": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
    }
    return Action("condition", "Pod", pod.name, messages[reason], body=condition, uid=pod.uid, event="PodRoutable")
