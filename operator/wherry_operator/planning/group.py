"""A replica as the planner sees it: the pods of one group, and whether it lives as a whole. Pure."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from itertools import groupby

from wherry_operator.planning.pods import PodView

# A run of this length is no crash loop, and a group that lived this long did not fail because of how it was made.
HEALTHY_AFTER_S = 600.0
# By then Kubernetes itself keeps pods off a node that is gone (its taint comes after 40 to 50 s by default).
AVOID_S = 60.0


@dataclass(frozen=True)
class Loss:
    """Why a group will not come back.

    `pod` is the root cause. `counts`: whether it is the group's own failure, so that failures in a row wait longer and
    longer; a lost node is not. `ended` is when the group stopped living and `waits_from` when a wait begins.
    `graceful`: what is left of it may finish what it has begun.
    """

    pod: PodView
    what: str
    counts: bool
    ended: datetime
    waits_from: datetime
    graceful: bool = False


@dataclass(frozen=True)
class GroupView:
    """The pods of one group that exist, by index; at least one. A group lives and dies as a whole."""

    key: str
    pods: tuple[PodView, ...]

    @property
    def size(self) -> int:
        """Pods that it should have."""
        return self.pods[0].group_size

    @property
    def name(self) -> str:
        """For people: the pod's name, or what the pods' names begin with."""
        return self.pods[0].name if self.size == 1 else self.pods[0].name.rpartition("-")[0]

    @property
    def revision(self) -> str:
        return self.pods[0].revision

    @property
    def created(self) -> datetime:
        """When its first pod was made."""
        return min(pod.created for pod in self.pods)

    @property
    def whole(self) -> bool:
        """Whether every pod exists."""
        return [pod.index for pod in self.pods] == list(range(self.size)) or self.size == len(self.pods) == 1

    @property
    def ready(self) -> bool:
        """Whether it serves: all of its pods are ready."""
        return self.whole and all(pod.ready for pod in self.pods)

    @property
    def was_ready(self) -> bool:
        """Whether it served once, as far as its pods still show."""
        return self.whole and all(pod.ready or pod.was_ready for pod in self.pods)

    @property
    def scheduled(self) -> bool:
        return all(pod.node for pod in self.pods)

    @property
    def nodes(self) -> frozenset[str]:
        """The nodes that its pods are bound to."""
        return frozenset(pod.node for pod in self.pods if pod.node)

    @property
    def deleting(self) -> bool:
        """Whether all of it is on its way out; such a group is not counted any more."""
        return all(pod.deleting for pod in self.pods)

    @property
    def draining(self) -> bool:
        """Whether routers were told to keep away from it."""
        return any(pod.drain for pod in self.pods)

    @property
    def failures(self) -> int:
        """How many groups before it failed in a row."""
        return max(pod.failures for pod in self.pods)

    @property
    def restarts(self) -> int:
        """How often it fell and met again.

        Ranks that exit together are one incident, so the pod that restarted most often tells; the kubelet counts.
        """
        return max(pod.restarts for pod in self.pods)

    @property
    def missing(self) -> tuple[int, ...]:
        """Indices of the pods that do not exist."""
        have = {pod.index for pod in self.pods}
        return () if self.whole else tuple(index for index in range(self.size) if index not in have)

    def loss(self, max_restarts: int, lost: Collection[str], live: Collection[str], now: datetime) -> Loss | None:
        """Why the group is lost, all of it; None while it lives or is on its way out."""
        if self.deleting:
            return None
        return (
            self._node_lost()
            or self._ended()
            or self._torn()
            or self._worn_out(max_restarts)
            or self._shut_out(lost, live, now)
        )

    def avoids_until(self, now: datetime) -> float | None:
        """Seconds until a pod without a node need not keep off nodes that were lost; None if there is none."""
        waits = [AVOID_S - (now - pod.created).total_seconds() for pod in self.pods if pod.avoids and not pod.node]
        return min(waits, default=None)

    def _node_lost(self) -> Loss | None:
        pod = next((pod for pod in self.pods if pod.lost_because), None)
        return self._outside(pod, pod.lost_because) if pod else None

    def _ended(self) -> Loss | None:
        pod = next((pod for pod in self.pods if pod.ended), None)
        if pod is None:
            return None
        what = pod.reason or pod.container.exit_reason or pod.phase
        when = pod.finished or pod.created
        return Loss(pod, f"ended: {what}", True, when, when)

    def _torn(self) -> Loss | None:
        """A pod is missing that was there, or one that is there cannot find the others."""
        first = self.pods[0]
        if leaving := next((pod for pod in self.pods if pod.deleting), None):
            return self._outside(leaving, "is being deleted", graceful=True)
        if self.size == 1:
            return None
        if first.index != 0:
            return self._outside(first, "has lost its leader, pod 0")
        if self.missing and any(pod.ready or pod.was_ready or pod.restarts for pod in self.pods):
            return self._outside(first, f"has lost pod {self.missing[0]} of its group")
        if astray := next((pod for pod in self.pods[1:] if first.ip and pod.leader != first.ip), None):
            return self._outside(astray, "cannot find pod 0 any more, which has another address now")
        return None

    def _worn_out(self, max_restarts: int) -> Loss | None:
        """It restarted too often, and not for the first time after a long while of working well."""
        if self.ready or self.restarts <= max_restarts:
            return None
        pod = root_cause(self.pods)
        state = pod.container
        if state.ran_s >= HEALTHY_AFTER_S:
            return None
        last = state.exit_message.splitlines()[-1:] or [state.exit_reason or f"exit code {state.exit_code}"]
        what = f"restarted {self.restarts} times, more than failover.maxGroupRestarts: {last[0]}"
        # From its creation, because the end moves on with every further restart.
        return Loss(pod, what, True, state.exited or self.created, self.created)

    def _shut_out(self, lost: Collection[str], live: Collection[str], now: datetime) -> Loss | None:
        """It finds no place, and a node that it must keep off is back, or at least no longer held for lost."""
        wait = self.avoids_until(now)
        if wait is None:
            return None
        for pod in self.pods:
            back = (node for node in pod.avoids if node in live or (wait <= 0 and node not in lost))
            if not pod.node and (node := next(back, "")):
                return self._outside(pod, f"keeps off node {node}, which may be used again")
        return None

    def _outside(self, pod: PodView, what: str, graceful: bool = False) -> Loss:
        return Loss(pod, what, False, pod.created, pod.created, graceful)


def root_cause(pods: Iterable[PodView]) -> PodView:
    """The pod whose container fell for a reason of its own; of several the one that fell most often.

    A rank that ends because another one did says so, and is not the one to blame.
    """
    return min(pods, key=lambda pod: (pod.container.exit_code is None, pod.blames_peer, -pod.restarts, pod.index))


def group_views(pods: Iterable[PodView]) -> tuple[GroupView, ...]:
    """The groups of `pods`, by name. A pod without a group is one by itself."""
    ordered = sorted(pods, key=lambda pod: (pod.group or pod.name, pod.index, pod.name))
    return tuple(GroupView(key, tuple(members)) for key, members in groupby(ordered, lambda p: p.group or p.name))


def ready_leaders(pods: Iterable[PodView]) -> list[PodView]:
    """The pods that take requests and speak for their whole group: the leaders of groups that serve and stay."""
    return [group.pods[0] for group in group_views(pods) if group.ready and not group.deleting]
