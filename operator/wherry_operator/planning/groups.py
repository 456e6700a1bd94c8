"""Which groups to create and which to delete: replacement, scaling and rolling update. Pure.

With D wanted replicas, S = maxSurge and U = maxUnavailable, of a rollout in progress:

- never more than D + S groups exist (those being deleted not counted);
- a ready group of an old revision is taken down only while more than D - U groups are ready;
- groups that never served, and are of an old revision, go at once.

Revisions are compared, not remembered: when an edit is reverted midway the groups that still run the reverted-to
revision are current again, and stay. A crashed container is the kubelet's to restart; only a group that is gone or has
ended for good is replaced. Failures in a row make each replacement wait longer, and the count travels on the pods
themselves (an annotation), so a restarted operator goes on where the last one was.
"""

import math
from dataclasses import dataclass
from datetime import datetime

from wherry_operator.api.v1alpha1 import PendingAction
from wherry_operator.planning.pods import PodView

BACKOFF_FIRST_S = 10.0
BACKOFF_MAX_S = 300.0
# A pod that lived this long did not fail because of how it was made.
HEALTHY_AFTER_S = 600.0


@dataclass(frozen=True)
class Creation:
    """A group to make; `failures` of its predecessors failed in a row."""

    reason: str
    failures: int = 0


@dataclass(frozen=True)
class Deletion:
    """A group to take down."""

    pod: PodView
    reason: str


@dataclass(frozen=True)
class GroupPlan:
    """Creations come before deletions, so that a failure count is never lost between the two."""

    creations: tuple[Creation, ...] = ()
    deletions: tuple[Deletion, ...] = ()
    pending: tuple[PendingAction, ...] = ()
    retry_after: float | None = None


def resolve(value: int | str, replicas: int, *, up: bool) -> int:
    """A number or a percentage of `replicas`."""
    if isinstance(value, int):
        return value
    share = replicas * int(value.removesuffix("%")) / 100
    return math.ceil(share) if up else math.floor(share)


def bounds(max_surge: int | str, max_unavailable: int | str, replicas: int) -> tuple[int, int]:
    """(S, U) in groups. Where both come out as 0 (percentages of few), one may be missing, or nothing ever moved."""
    surge, unavailable = resolve(max_surge, replicas, up=True), resolve(max_unavailable, replicas, up=False)
    return (surge, unavailable) if surge or unavailable else (0, 1)


def failures_of(pod: PodView) -> int:
    """How many pods in a row have failed, this one included."""
    lived = (pod.finished - pod.created).total_seconds() if pod.finished else 0.0
    return 1 if lived >= HEALTHY_AFTER_S else pod.failures + 1


def backoff(failures: int) -> float:
    """Seconds to wait before the replacement: none after a first failure, then 10 s doubling up to 5 min."""
    return 0.0 if failures <= 1 else min(BACKOFF_FIRST_S * 2.0 ** (failures - 2), BACKOFF_MAX_S)


def _least_useful(pod: PodView) -> tuple[bool, bool, bool, float]:
    # Not ready before ready, not scheduled before scheduled, and the youngest first: the old have the warm caches.
    return (pod.ready, pod.was_ready, bool(pod.node), -pod.created.timestamp())


def plan_groups(
    pods: tuple[PodView, ...], replicas: int, revision: str, surge: int, unavailable: int, now: datetime
) -> GroupPlan:
    """What to do about the runtime pods, given the wanted number and revision."""
    planner = _Planner(replicas, revision, surge, unavailable, now)
    alive = [pod for pod in pods if not pod.deleting]
    planner.sort_out_failed([pod for pod in alive if pod.lost])
    planner.move([pod for pod in alive if not pod.lost])
    return GroupPlan(tuple(planner.creations), tuple(planner.deletions), tuple(planner.pending), planner.retry_after())


class _Planner:
    """One pass over the groups; its lists are the plan."""

    def __init__(self, replicas: int, revision: str, surge: int, unavailable: int, now: datetime) -> None:
        self.replicas, self.revision, self.surge, self.unavailable, self.now = (
            replicas,
            revision,
            surge,
            unavailable,
            now,
        )
        self.creations: list[Creation] = []
        self.deletions: list[Deletion] = []
        self.pending: list[PendingAction] = []
        self.held: list[PodView] = []  # failed, and their replacement has to wait
        self.failures: list[int] = []  # of those whose replacement is due
        self.causes: list[str] = []
        self.rolling = False
        self.wanted = f"{replicas} {'replica is' if replicas == 1 else 'replicas are'} wanted"

    def sort_out_failed(self, failed: list[PodView]) -> None:
        for pod in sorted(failed, key=lambda p: p.created):
            what = pod.reason or pod.container.exit_reason or pod.phase
            if pod.revision != self.revision:
                self.deletions.append(Deletion(pod, f"it ended ({what}) and is of an old revision"))
                continue
            count = failures_of(pod)
            if self._left(pod) > 0:
                self.held.append(pod)
            else:
                self.failures.append(count)
                self.causes.append(f"replaces {pod.name}, which ended: {what}")
                self.deletions.append(Deletion(pod, f"it ended: {what}"))

    def _left(self, pod: PodView) -> float:
        """Seconds until the failed pod's replacement is due."""
        return backoff(failures_of(pod)) - (self.now - (pod.finished or self.now)).total_seconds()

    def retry_after(self) -> float | None:
        return min(map(self._left, self.held), default=None)

    def move(self, live: list[PodView]) -> None:
        current = [pod for pod in live if pod.revision == self.revision]
        old = [pod for pod in live if pod.revision != self.revision]
        self.rolling = bool(old)
        current = self._drop_excess(current)
        old = self._drop_useless(old, current)
        old = self._take_down(old, current)
        self._create(current, old)
        self._explain(current, old)

    def _drop_excess(self, current: list[PodView]) -> list[PodView]:
        excess = len(current) + len(self.held) - self.replicas
        while excess > 0 and self.held:
            self.deletions.append(Deletion(self.held.pop(), self.wanted))
            excess -= 1
        if excess <= 0:
            return current
        ranked = sorted(current, key=_least_useful)
        self.deletions += [Deletion(pod, self.wanted) for pod in ranked[:excess]]
        return ranked[excess:]

    def _drop_useless(self, old: list[PodView], current: list[PodView]) -> list[PodView]:
        ready = sum(pod.ready for pod in old + current)
        enough = ready >= self.replicas - self.unavailable
        useless = [pod for pod in old if not pod.ready and (enough or not pod.was_ready)]
        self.deletions += [Deletion(pod, "it is of an old revision and not ready") for pod in useless]
        return [pod for pod in old if pod not in useless]

    def _take_down(self, old: list[PodView], current: list[PodView]) -> list[PodView]:
        spare = sum(pod.ready for pod in old + current) - max(0, self.replicas - self.unavailable)
        ready_old = sorted((pod for pod in old if pod.ready), key=lambda pod: pod.created)
        gone = ready_old[: max(0, spare)]
        self.deletions += [
            Deletion(pod, f"it is of an old revision; revision {self.revision} takes over") for pod in gone
        ]
        return [pod for pod in old if pod not in gone]

    def _create(self, current: list[PodView], old: list[PodView]) -> None:
        have = len(current) + len(self.held)
        room = self.replicas + self.surge - have - len(old)
        count = max(0, min(self.replicas - have, room))
        self.failures.sort(reverse=True)
        for index in range(count):
            if index < len(self.failures):
                self.creations.append(Creation(self.causes[index], self.failures[index]))
            elif self.rolling:
                self.creations.append(Creation(f"rollout to revision {self.revision}"))
            else:
                self.creations.append(Creation(self.wanted))
        if (waiting := self.replicas - have - count) > 0:
            reason = f"rollout to revision {self.revision}: waits until older pods are gone"
            self.pending.append(PendingAction(action="CreatePod", target=f"{waiting} more", reason=reason))

    def _explain(self, current: list[PodView], old: list[PodView]) -> None:
        waits_for = ", ".join(sorted(pod.name for pod in current if not pod.ready)) or "new pods"
        for pod in sorted(old, key=lambda p: p.name):
            reason = f"of an old revision; stays until {waits_for} can take over"
            self.pending.append(PendingAction(action="DeletePod", target=pod.name, reason=reason))
        for pod in sorted(self.held, key=lambda p: p.name):
            reason = (
                f"failed {failures_of(pod)} times in a row; replaced {backoff(failures_of(pod)):.0f} s after it ended"
            )
            self.pending.append(PendingAction(action="CreatePod", target=f"instead of {pod.name}", reason=reason))
