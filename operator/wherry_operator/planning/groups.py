"""Which groups to create and which to delete: replacement, scaling and rolling update. Pure.

With D wanted replicas, S = maxSurge and U = maxUnavailable, of a rollout in progress:

- never more than D + S groups exist (those being deleted not counted);
- a ready group of an old revision is taken down only while more than D - U groups are ready;
- groups that never served, and are of an old revision, go at once.

Revisions are compared, not remembered: when an edit is reverted midway the groups that still run the reverted-to
revision are current again, and stay. A crashed container is the kubelet's to restart; a group is replaced when one of
its pods is gone or has ended for good, when its node is lost, or when it restarted too often. Failures in a row make
each replacement wait longer, and the count travels on the pods themselves (an annotation), so a restarted operator
goes on where the last one was. A lost node is no failure of the group: its replacement never waits.

A group begins with pod 0; when that has an address the others are made with it (an Addition).
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime

from wherry_operator.api.v1alpha1 import PendingAction
from wherry_operator.planning.group import HEALTHY_AFTER_S, GroupView, Loss, group_views
from wherry_operator.planning.pods import PodView

BACKOFF_FIRST_S = 10.0
BACKOFF_MAX_S = 300.0
DEFAULT_MAX_RESTARTS = 5


@dataclass(frozen=True)
class Creation:
    """A group to make; `failures` of its predecessors failed in a row, the last one of `cause`."""

    reason: str
    failures: int = 0
    cause: str = ""


@dataclass(frozen=True)
class Addition:
    """Pod number `index` of a group whose pod 0 has an address: `leader`."""

    group: GroupView
    index: int
    leader: str
    reason: str


@dataclass(frozen=True)
class Deletion:
    """A group to take down, all its pods. `graceful`: it may be serving, so it is drained first; otherwise at once."""

    group: GroupView
    reason: str
    graceful: bool = True


@dataclass(frozen=True)
class GroupPlan:
    """Creations come before deletions, so that a failure count is never lost between the two."""

    creations: tuple[Creation, ...] = ()
    additions: tuple[Addition, ...] = ()
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


def failures_of(group: GroupView, loss: Loss) -> int:
    """How many groups in a row have failed, this one included; 0 where it is not its own failure."""
    if not loss.counts:
        return group.failures
    lived = (loss.ended - group.created).total_seconds()
    return 1 if lived >= HEALTHY_AFTER_S else group.failures + 1


def backoff(failures: int) -> float:
    """Seconds to wait before the replacement: none after a first failure, then 10 s doubling up to 5 min."""
    return 0.0 if failures <= 1 else min(BACKOFF_FIRST_S * 2.0 ** (failures - 2), BACKOFF_MAX_S)


def _taken_down(group: GroupView, reason: str) -> Deletion:
    # Routers send requests to a group whose containers are ready, also before its pods are Ready by their gates.
    loaded = group.whole and all(pod.containers_ready for pod in group.pods)
    return Deletion(group, reason, graceful=group.ready or group.was_ready or loaded)


def plan_groups(
    pods: tuple[PodView, ...],
    replicas: int,
    revision: str,
    surge: int,
    unavailable: int,
    now: datetime,
    *,
    max_restarts: int = DEFAULT_MAX_RESTARTS,
    lost_nodes: Collection[str] = (),
    live_nodes: Collection[str] = (),
    busy: Mapping[str, int] | None = None,
    moving: Mapping[str, str] | None = None,
) -> GroupPlan:
    """What to do about the runtime pods, given the wanted number of groups and their revision.

    Args:
        pods: all of them; a pod with `lost_because` is on a lost node.
        replicas: groups that are wanted.
        revision: the wanted one.
        surge: groups above `replicas` while others are exchanged.
        unavailable: ready groups that may be missing meanwhile.
        now: the time.
        max_restarts: restarts in place after which a group that does not work is replaced.
        lost_nodes: where nothing may be put.
        live_nodes: those that show life; a pod without a place that keeps off one of these is made anew.
        busy: requests that run in a group, by its key; the least busy go first when there are too many.
        moving: groups that should go elsewhere, by key, and why; they are exchanged like those of an old revision.
    """
    planner = _Planner(replicas, revision, surge, unavailable, now, busy or {}, moving or {})
    groups = [group for group in group_views(pods) if not group.deleting]
    losses = {group.key: loss for group in groups if (loss := group.loss(max_restarts, lost_nodes, live_nodes, now))}
    planner.sort_out_failed([(group, losses[group.key]) for group in groups if group.key in losses])
    planner.move([group for group in groups if group.key not in losses])
    return planner.plan()


class _Planner:
    """One pass over the groups; its lists are the plan."""

    def __init__(
        self,
        replicas: int,
        revision: str,
        surge: int,
        unavailable: int,
        now: datetime,
        busy: Mapping[str, int],
        moving: Mapping[str, str],
    ) -> None:
        self.replicas, self.revision, self.surge, self.unavailable = replicas, revision, surge, unavailable
        self.now, self.busy, self.moving = now, busy, moving
        self.creations: list[Creation] = []
        self.additions: list[Addition] = []
        self.deletions: list[Deletion] = []
        self.pending: list[PendingAction] = []
        self.held: list[tuple[GroupView, Loss]] = []  # failed, and their replacement has to wait
        self.due: list[Creation] = []  # replacements that need not wait
        self.live: list[GroupView] = []
        self.rolling = False
        self.wanted = f"{replicas} {'replica is' if replicas == 1 else 'replicas are'} wanted"

    def plan(self) -> GroupPlan:
        waits = [self._left(*entry) for entry in self.held]
        waits += [wait for group in self.live if (wait := group.avoids_until(self.now)) and wait > 0]
        retry = min(waits, default=None)
        return GroupPlan(
            creations=tuple(self.creations),
            additions=tuple(self.additions),
            deletions=tuple(self.deletions),
            pending=tuple(self.pending),
            retry_after=retry,
        )

    def sort_out_failed(self, failed: list[tuple[GroupView, Loss]]) -> None:
        for group, loss in sorted(failed, key=lambda entry: entry[0].created):
            what = loss.what if group.size == 1 else f"its pod {loss.pod.name} {loss.what}"
            if group.revision != self.revision:
                self.deletions.append(Deletion(group, f"{_it(what)} and is of an old revision", loss.graceful))
            elif self._left(group, loss) > 0:
                self.held.append((group, loss))
            else:
                cause = f"{loss.pod.name} {loss.what}" if loss.counts and not loss.pod.ended else ""
                reason = f"replaces {group.name}, which {what}" if group.size == 1 else f"replaces {group.name}: {what}"
                self.due.append(Creation(reason, failures_of(group, loss), cause))
                self.deletions.append(Deletion(group, _it(what), loss.graceful))

    def _left(self, group: GroupView, loss: Loss) -> float:
        """Seconds until the failed group's replacement is due."""
        wait = backoff(failures_of(group, loss)) if loss.counts else 0.0
        return wait - (self.now - loss.waits_from).total_seconds()

    def move(self, live: list[GroupView]) -> None:
        self.live = live
        old = [group for group in live if self._leaves(group)]
        current = [group for group in live if group not in old]
        self.rolling = any(group.revision != self.revision for group in old)
        current = self._drop_excess(current)
        old = self._drop_useless(old, current)
        old = self._take_down(old, current)
        self._create(current, old)
        self._complete(current)
        self._explain(current, old)

    def _leaves(self, group: GroupView) -> str:
        """Why a live group is to be exchanged; empty if it may stay."""
        return "it is of an old revision" if group.revision != self.revision else self.moving.get(group.key, "")

    def _least_useful(self, group: GroupView) -> tuple[bool, bool, bool, bool, int, float]:
        # What goes already before what stays, not ready before ready, not scheduled before scheduled, the least busy,
        # and the youngest first: the old have the warm caches.
        busy = self.busy.get(group.key, 0)
        ranks = (not group.draining, group.ready, group.was_ready, group.scheduled)
        return (*ranks, busy, -group.created.timestamp())

    def _drop_excess(self, current: list[GroupView]) -> list[GroupView]:
        excess = len(current) + len(self.held) - self.replicas
        while excess > 0 and self.held:
            self.deletions.append(Deletion(self.held.pop()[0], self.wanted, graceful=False))
            excess -= 1
        if excess <= 0:
            return current
        ranked = sorted(current, key=self._least_useful)
        self.deletions += [_taken_down(group, self.wanted) for group in ranked[:excess]]
        return ranked[excess:]

    def _drop_useless(self, old: list[GroupView], current: list[GroupView]) -> list[GroupView]:
        ready = sum(group.ready for group in old + current)
        enough = ready >= self.replicas - self.unavailable
        useless = [group for group in old if not group.ready and (enough or not group.was_ready)]
        self.deletions += [_taken_down(group, f"{self._leaves(group)} and not ready") for group in useless]
        return [group for group in old if group not in useless]

    def _take_down(self, old: list[GroupView], current: list[GroupView]) -> list[GroupView]:
        spare = sum(group.ready for group in old + current) - max(0, self.replicas - self.unavailable)
        ready_old = sorted((g for g in old if g.ready), key=lambda g: (not g.draining, g.created))
        gone = ready_old[: max(0, spare)]
        takes_over = f"revision {self.revision} takes over" if self.rolling else "others take over"
        self.deletions += [_taken_down(group, f"{self._leaves(group)}; {takes_over}") for group in gone]
        return [group for group in old if group not in gone]

    def _create(self, current: list[GroupView], old: list[GroupView]) -> None:
        have = len(current) + len(self.held)
        room = self.replicas + self.surge - have - len(old)
        count = max(0, min(self.replicas - have, room))
        what = f"rollout to revision {self.revision}"
        if moved := sorted(group.name for group in old if group.revision == self.revision):
            what = what if self.rolling else f"takes over from {', '.join(moved)}"
        self.due.sort(key=lambda creation: -creation.failures)
        self.creations += self.due[:count]
        self.creations += [Creation(what if old or self.rolling else self.wanted)] * (count - len(self.creations))
        if (waiting := self.replicas - have - count) > 0:
            reason = f"{what}: waits until older pods are gone"
            self.pending.append(PendingAction(action="CreatePod", target=f"{waiting} more", reason=reason))

    def _complete(self, current: list[GroupView]) -> None:
        """Adds what groups lack whose leader has an address."""
        for group in current:
            leader = group.pods[0]
            for index in group.missing:
                if leader.index == 0 and leader.ip:
                    reason = f"pod {index} of {group.size} of {group.name}"
                    self.additions.append(Addition(group, index, leader.ip, reason))
                else:
                    reason = f"pod {index} of {group.size}; waits until {leader.name} has an address"
                    self.pending.append(PendingAction(action="CreatePod", target=group.name, reason=reason))

    def _explain(self, current: list[GroupView], old: list[GroupView]) -> None:
        waits_for = ", ".join(sorted(group.name for group in current if not group.ready)) or "new pods"
        for group in sorted(old, key=lambda g: g.name):
            why = self._leaves(group).removeprefix("it is ")
            reason = f"{why}; stays until {waits_for} can take over"
            self.pending.append(PendingAction(action="DeletePod", target=group.name, reason=reason))
        for group, loss in sorted(self.held, key=lambda entry: entry[0].name):
            count = failures_of(group, loss)
            since = "it ended" if loss.waits_from == loss.ended else "it was made"
            reason = f"failed {count} times in a row; replaced {backoff(count):.0f} s after {since}"
            self.pending.append(PendingAction(action="CreatePod", target=f"instead of {group.name}", reason=reason))


def _it(what: str) -> str:
    return what if what.startswith("its ") else f"it {what}"
