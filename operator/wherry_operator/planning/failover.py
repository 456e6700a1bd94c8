"""Which nodes are lost, and which pods with them: a decision over what the operator saw, and when. Pure.

A pod is lost when its worker has been out of reach for `failover.nodeUnreachable` and something independent of that
says that its node is gone: the kubelet does not answer either, the node's Lease is no longer renewed, the node is not
ready or has been deleted. A worker that this operator never reached tells nothing by being silent (a NetworkPolicy may
stand between), so two signals of the node are needed then. A frozen process on a live node is no lost node: its kubelet
answers, and restarts it. Once a node is lost, whatever else is bound to it and silent is lost with it.

Routers are watched like workers. Their Deployment replaces one as soon as it is deleted, and the Service forgets it.

When more than half of the nodes that this operator has ever heard of look lost, it is the operator that is cut off, as
far as anybody can tell: it then holds nothing for lost, neither deletes nor replaces, and says so. Kubernetes' own,
slower eviction goes on.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from wherry_operator.planning.pods import PodView
from wherry_operator.planning.types import Action, Observed

# A kubelet that misses one probe is busy; one that misses all for this long is not there.
KUBELET_SILENT_S = 2.0
# Renewals may be late; half an interval more than the next one was due is too late.
LEASE_SLACK = 1.5


@dataclass(frozen=True)
class PodSignal:
    """One worker or router. Times are seconds of the operator's own clock.

    `silent_since`: when the first of the probes began that have failed in a row; None while it answers. `reached`:
    whether this operator ever had a connection to it. `patience_s`: its LLMDeployment's failover.nodeUnreachable.
    """

    uid: str
    node: str
    silent_since: float | None = None
    reached: bool = True
    patience_s: float = 5.0


@dataclass(frozen=True)
class NodeSignal:
    """One node. What is not known speaks neither for nor against it.

    `kubelet_silent_since` is like that of a pod; `kubelet_answered`: whether it ever answered this operator. `ready` is
    the status of its condition Ready; empty where it cannot be read. `lease_still_since`: when its Lease was first seen
    as it is still; `renew_interval_s`: how often it should change. `deleted`: its Node object does not exist.
    """

    name: str
    kubelet_silent_since: float | None = None
    kubelet_answered: bool = False
    ready: str = ""
    lease_still_since: float | None = None
    renew_interval_s: float = 10.0
    deleted: bool = False


@dataclass(frozen=True)
class Verdict:
    """`lost`: why, by each lost pod's uid. `nodes`: those that are lost. `isolated`: why it does not trust itself.

    `live`: nodes that show life; of those that are in neither list nothing is known.
    """

    lost: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}))
    nodes: tuple[str, ...] = ()
    isolated: str = ""
    live: frozenset[str] = frozenset()


def evidence(node: NodeSignal, now: float) -> list[str]:
    """What says that a node is gone, in words; each is a signal of its own."""
    found = []
    if node.deleted:
        found.append("its Node has been deleted")
    if node.kubelet_answered and node.kubelet_silent_since is not None:
        silent = now - node.kubelet_silent_since
        if silent >= KUBELET_SILENT_S:
            found.append(f"its kubelet has not answered for {silent:.0f} s")
    if node.lease_still_since is not None:
        still = now - node.lease_still_since
        if still > node.renew_interval_s * LEASE_SLACK:
            found.append(f"its Lease has not been renewed for {still:.0f} s")
    if node.ready in ("False", "Unknown"):
        found.append(f"its condition Ready is {node.ready}")
    return found


def judge(pods: Sequence[PodSignal], nodes: Sequence[NodeSignal], now: float, api_answers: bool = True) -> Verdict:
    """Who is lost.

    Args:
        pods: every runtime pod that is bound to a node and has not ended.
        nodes: the nodes of these pods, and others that the operator knows; these are there to compare with.
        now: the time of the same clock.
        api_answers: whether the API server answered what was asked of it last.
    """
    by_name = {node.name: node for node in nodes}
    living = {pod.node for pod in pods if pod.silent_since is None and pod.reached}
    lost: dict[str, str] = {}
    gone: set[str] = set()
    for pod in sorted(pods, key=lambda pod: not pod.reached):
        node = by_name.get(pod.node)
        if node is None or pod.node in living or pod.silent_since is None:
            continue
        silent = now - pod.silent_since
        signs = evidence(node, now)
        needed = 1 if pod.reached or pod.node in gone else 2
        if silent >= pod.patience_s and len(signs) >= needed:
            gone.add(pod.node)
            why = " and ".join(signs)
            lost[pod.uid] = f"was lost with node {pod.node}: it has been out of reach for {silent:.0f} s, and {why}"
    live = frozenset(living | {node.name for node in nodes if _shows_life(node, now)})
    if not lost:
        return Verdict(live=live)
    if not api_answers:
        return Verdict(isolated="the API server does not answer either", live=live)
    known = living | {node.name for node in nodes if node.kubelet_answered} | {p.node for p in pods if p.reached}
    doubtful = sum(node.name in known - living and _doubtful(node, now) for node in nodes)
    if 2 * doubtful > len(known):
        return Verdict(
            isolated=f"{doubtful} of {len(known)} nodes that the operator watches look lost at once, so the operator "
            "itself may be cut off: it deletes and replaces nothing until it sees more than half of them",
            live=live,
        )
    return Verdict(lost, tuple(sorted(gone)), live=live)


def _shows_life(node: NodeSignal, now: float) -> bool:
    return node.kubelet_answered and node.kubelet_silent_since is None and not evidence(node, now)


def _doubtful(node: NodeSignal, now: float) -> bool:
    """Whether a node may be lost, also where that is not sure yet: the others may only be a moment behind the first."""
    return (node.kubelet_answered and node.kubelet_silent_since is not None) or bool(evidence(node, now))


def with_verdict(observed: Observed, verdict: Verdict) -> Observed:
    """The snapshot, with what the verdict says about its pods."""

    def marked(pods: tuple[PodView, ...]) -> tuple[PodView, ...]:
        return tuple(replace(pod, lost_because=verdict.lost.get(pod.uid, "")) for pod in pods)

    return replace(
        observed,
        pods=marked(observed.pods),
        router_pods=marked(observed.router_pods),
        lost_nodes=verdict.nodes,
        live_nodes=verdict.live,
        isolated=verdict.isolated,
    )


def lost_routers(observed: Observed) -> list[Action]:
    """Deletes the router pods that are lost, so that their Deployment replaces them and their Service forgets them."""
    return [
        Action("delete", "Pod", pod.name, f"it {pod.lost_because}", uid=pod.uid)
        for pod in observed.router_pods
        if pod.lost_because and not pod.deleting
    ]
