"""Root causes: what, of all that a pod says about itself, is the thing to tell a person. Pure.

Each look-out below recognises one kind of trouble; the first that does, in order, gives the pod's cause.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from wherry_operator.planning.group import GroupView, root_cause
from wherry_operator.planning.pods import PodView

Severity = Literal["waiting", "capacity", "error"]


@dataclass(frozen=True)
class Cause:
    """`waiting`: give it time. `capacity`: the cluster lacks room. `error`: somebody has to act."""

    reason: str
    message: str
    severity: Severity = "error"


IMAGE_REASONS = ("ErrImagePull", "ImagePullBackOff", "InvalidImageName", "ErrImageNeverPull", "RegistryUnavailable")
CONFIG_REASONS = ("CreateContainerConfigError", "CreateContainerError", "RunContainerError")


def _ended(pod: PodView) -> Cause | None:
    if pod.lost_because:
        return Cause("NodeLost", f"pod {pod.name} {pod.lost_because}")
    if not pod.ended:
        return None
    reason = pod.reason or pod.container.exit_reason or "PodFailed"
    text = pod.message or pod.container.exit_message or f"the pod ended with phase {pod.phase}"
    return Cause(reason, f"pod {pod.name}: {text}")


def _image(pod: PodView) -> Cause | None:
    if pod.container.waiting_reason not in IMAGE_REASONS:
        return None
    text = pod.container.waiting_message or "the image cannot be pulled"
    # The kubelet alternates between ErrImagePull and ImagePullBackOff; one reason keeps the condition still.
    return Cause("ImagePullFailed", f"pod {pod.name}, container {pod.container.name}: {text}")


def _config(pod: PodView) -> Cause | None:
    if pod.container.waiting_reason not in CONFIG_REASONS:
        return None
    text = pod.container.waiting_message
    return Cause(pod.container.waiting_reason, f"pod {pod.name}, container {pod.container.name}: {text}")


def _crash(pod: PodView) -> Cause | None:
    state = pod.container
    crashed = state.exit_code is not None and (state.exit_code != 0 or state.waiting_reason == "CrashLoopBackOff")
    if pod.ready or not (crashed or state.waiting_reason == "CrashLoopBackOff"):
        return None
    if state.exit_reason == "OOMKilled":
        text = "it used more memory than its limit; raise spec.resources.limits.memory or lower batching.kvCacheMemory"
        return Cause("OutOfMemory", f"pod {pod.name}, container {state.name}: {text}")
    last = state.exit_message.splitlines()[-1:] or [f"it ended with exit code {state.exit_code}; see its log"]
    return Cause("CrashLoopBackOff", f"pod {pod.name}, container {state.name}: {last[0]}")


def _volume(pod: PodView) -> Cause | None:
    if "persistentvolumeclaim" not in pod.unschedulable:
        return None
    return Cause("VolumeNotFound", f"pod {pod.name}: {pod.unschedulable}")


def _unschedulable(pod: PodView) -> Cause | None:
    if not pod.unschedulable or pod.node:
        return None
    return Cause("Unschedulable", f"pod {pod.name}: {pod.unschedulable}", "capacity")


def _failed_before(pod: PodView) -> Cause | None:
    # Until it works: what the group that it replaces died of is still what has to be mended.
    if pod.ready or pod.was_ready or not pod.failed_before:
        return None
    return Cause("RestartsExhausted", f"pod {pod.name} replaces one that did not work: {pod.failed_before}")


def _not_scheduled(pod: PodView) -> Cause | None:
    if pod.node or pod.ready:
        return None
    return Cause("Scheduling", f"pod {pod.name} has no node yet", "waiting")


def _starting(pod: PodView) -> Cause | None:
    if pod.ready or pod.container.started:
        return None
    return Cause("ContainerCreating", f"pod {pod.name} is being started on {pod.node}", "waiting")


def _loading(pod: PodView) -> Cause | None:
    if pod.ready:
        return None
    if pod.gated and pod.containers_ready:
        return Cause("NotRoutable", f"pod {pod.name} has loaded the model; no router knows it yet", "waiting")
    if pod.was_ready:
        return Cause("NotReady", f"pod {pod.name} was ready and no longer is; see its log", "error")
    if pod.downloading:
        return Cause("Downloading", f"pod {pod.name} is downloading the model, {pod.downloading}", "waiting")
    return Cause("Loading", f"pod {pod.name} is loading the model", "waiting")


LOOKOUTS: Sequence[Callable[[PodView], Cause | None]] = (
    _ended,
    _image,
    _config,
    _crash,
    _volume,
    _unschedulable,
    _failed_before,
    _not_scheduled,
    _starting,
    _loading,
)


def cause_of(pod: PodView) -> Cause | None:
    """Why this pod does not serve; None if it does or is on its way out."""
    if pod.deleting:
        return None
    return next((cause for look in LOOKOUTS if (cause := look(pod))), None)


_WEIGHT = {"error": 0, "capacity": 1, "waiting": 2}


def worst(pods: Sequence[PodView]) -> Cause | None:
    """The one cause to show for all pods, with how many more share it. Errors before lack of room before waiting."""
    return _first(cause for pod in sorted(pods, key=lambda p: p.name) if (cause := cause_of(pod)))


def cause_of_group(group: GroupView, max_restarts: int) -> Cause | None:
    """Why this group does not serve, told of the pod that is to blame; None if it does or is on its way out."""
    causes = {pod.name: cause for pod in group.pods if (cause := cause_of(pod))}
    if not causes:
        return None
    most = min(_WEIGHT[cause.severity] for cause in causes.values())
    culprit = root_cause(
        [pod for pod in group.pods if pod.name in causes and _WEIGHT[causes[pod.name].severity] == most]
    )
    cause = causes[culprit.name]
    if cause.reason == "CrashLoopBackOff" and group.restarts > max_restarts:
        return Cause("RestartsExhausted", f"{cause.message} (restarted {group.restarts} times)")
    return cause


def worst_of_groups(groups: Sequence[GroupView], max_restarts: int) -> Cause | None:
    """As `worst`, with one cause for each group."""
    ordered = sorted(groups, key=lambda group: group.name)
    return _first(cause for group in ordered if (cause := cause_of_group(group, max_restarts)))


def _first(found: Iterable[Cause]) -> Cause | None:
    causes = list(found)
    if not causes:
        return None
    first = min(causes, key=lambda cause: _WEIGHT[cause.severity])
    more = Counter(cause.reason for cause in causes)[first.reason] - 1
    suffix = f" (and {more} more {'pod' if more == 1 else 'pods'})" if more else ""
    return Cause(first.reason, first.message + suffix, first.severity)
