"""How a group goes without cutting a stream: marked, left by its requests, deleted. Pure.

The mark is an annotation with a time. Routers send a marked group nothing new; by that time they move what still runs
there to other replicas. The group is deleted once no router has anything on it, or a little after that time at the
latest. Nothing is remembered: the mark on the pods is all the state there is, so a group that turns out to be wanted
after all is known by its mark, and loses it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from wherry_operator.api.v1alpha1 import PendingAction
from wherry_operator.planning.group import GroupView
from wherry_operator.planning.groups import Deletion
from wherry_operator.planning.routers import Routers
from wherry_operator.planning.types import Action
from wherry_protocol import naming

# Routers get this much, of the drain timeout, to move what is left; half of a timeout that is shorter.
RESUME_MARGIN_S = 10.0
# Routers are asked this often what is left.
POLL_S = 1.0


@dataclass(frozen=True)
class DrainPlan:
    """Marks, removed marks and deletions to carry out now, what is draining, and when to look again."""

    actions: tuple[Action, ...] = ()
    pending: tuple[PendingAction, ...] = ()
    retry_after: float | None = None


def plan_drains(
    deletions: Sequence[Deletion], groups: Sequence[GroupView], routers: Routers, now: datetime, timeout_s: float
) -> DrainPlan:
    """The next step for every group.

    Args:
        deletions: the groups that have to go, in order.
        groups: all groups that exist; a marked one that is to be deleted by none of these is wanted again.
        routers: the routers that may have requests, and what they reported.
        now: UTC.
        timeout_s: how long requests may take to finish where they are or move.
    """
    actions: list[Action] = []
    pending: list[PendingAction] = []
    going = {deletion.group.key for deletion in deletions}
    for group in groups:
        if group.key not in going:
            actions += _unmark(group)
    for deletion in deletions:
        if text := _go(deletion, routers, now):
            actions += _delete(deletion.group, text)
            continue
        deadline = _deadline(deletion.group, now, timeout_s)
        actions += _mark(deletion, deadline)
        pending.append(_waits(deletion, routers, deadline))
    return DrainPlan(tuple(actions), tuple(pending), POLL_S if pending else None)


def _go(deletion: Deletion, routers: Routers, now: datetime) -> str:
    """Why the group may be deleted now, beginning with why it has to go; empty if it may not."""
    group, knowledge = deletion.group, routers.about(deletion.group)
    if not deletion.graceful or not routers.uids or not (_may_serve(group) or knowledge.known):
        return deletion.reason
    until = _mark_of(group)
    if until is None:
        return ""
    if knowledge.free:
        return f"{deletion.reason}; it is drained"
    if now >= until + timedelta(seconds=RESUME_MARGIN_S):
        return f"{deletion.reason}; its time to drain is over, {_left(deletion, routers)}"
    return ""


def _may_serve(group: GroupView) -> bool:
    return all(pod.containers_ready for pod in group.pods) or group.ready or group.was_ready


def _mark_of(group: GroupView) -> datetime | None:
    """The time on pod 0, which is the one that routers look at."""
    return group.pods[0].drain


def _deadline(group: GroupView, now: datetime, timeout_s: float) -> datetime:
    if until := _mark_of(group):
        return until
    return now + timedelta(seconds=timeout_s - min(RESUME_MARGIN_S, timeout_s / 2))


def _text(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _mark(deletion: Deletion, deadline: datetime) -> list[Action]:
    text = _text(deadline)
    why = f"{deletion.reason}; its requests have until {text} to finish, then they are moved"
    return [
        Action("annotate", "Pod", pod.name, why, {naming.ANNOTATION_DRAIN: text}, pod.uid, event="DrainingPod")
        for pod in deletion.group.pods
        if pod.drain is None and not pod.deleting
    ]


def _unmark(group: GroupView) -> list[Action]:
    why = "it is wanted again"
    return [
        Action("annotate", "Pod", pod.name, why, {naming.ANNOTATION_DRAIN: None}, pod.uid, event="DrainCancelled")
        for pod in group.pods
        if pod.drain is not None and not pod.deleting
    ]


def _delete(group: GroupView, reason: str) -> list[Action]:
    return [Action("delete", "Pod", pod.name, reason, uid=pod.uid) for pod in group.pods if not pod.deleting]


def _waits(deletion: Deletion, routers: Routers, deadline: datetime) -> PendingAction:
    reason = f"{deletion.reason}; it drains until {_text(deadline)}: {_left(deletion, routers)}"
    return PendingAction(action="DeletePod", target=deletion.group.name, reason=reason)


def _left(deletion: Deletion, routers: Routers) -> str:
    count = routers.about(deletion.group).in_flight
    text = f"{count} {'request is' if count == 1 else 'requests are'} left"
    if routers.silent:
        text += f", and {routers.silent} of {len(routers.uids)} routers did not answer"
    return text
