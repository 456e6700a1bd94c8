"""PodDisruptionBudgets: what `kubectl drain` and other evictions have to leave alone. Pure.

Evictions take no notice of streams, so the runtime's budget admits none while there is nothing to spare: whoever
empties a node is made to wait, the operator sees that the node is being emptied, moves its groups and deletes what was
drained.
An operator that cannot see nodes could not help; its budget spares one replica for evictions, which end with the pod's
own drain.
"""

from typing import Any

from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.v1alpha1 import LLMDeploymentSpec
from wherry_operator.desired.common import metadata, router_name, selector, stamped
from wherry_protocol import naming


def runtime_budget_name(owner: LLMDeployment) -> str:
    """Name of the budget of the runtime's pods."""
    return owner.name


def router_budget_name(owner: LLMDeployment) -> str:
    """Name of the budget of the router's pods."""
    return router_name(owner)


def budgets(owner: LLMDeployment, spec: LLMDeploymentSpec, replicas: int, *, moves: bool) -> list[dict[str, Any]]:
    """The budgets while `replicas` groups are wanted. `moves`: the operator sees nodes that are being emptied.

    A single router has none: it would hold up every drain of its node for good.
    """
    # In pods: a percentage or maxUnavailable would be counted against the scale subresource, which counts groups.
    spared = replicas if moves else max(0, replicas - 1)
    found = [
        _budget(
            owner,
            runtime_budget_name(owner),
            naming.COMPONENT_RUNTIME,
            {"minAvailable": spared * spec.parallelism.pods},
        )
    ]
    if spec.router.replicas > 1:
        found.append(_budget(owner, router_budget_name(owner), naming.COMPONENT_ROUTER, {"maxUnavailable": 1}))
    return [stamped(body) for body in found]


def _budget(owner: LLMDeployment, name: str, component: str, bound: dict[str, int]) -> dict[str, Any]:
    return {
        "apiVersion": "policy/v1",
        "kind": "PodDisruptionBudget",
        "metadata": metadata(owner, name, component),
        "spec": {
            **bound,
            "selector": {"matchLabels": selector(owner, component)},
            # A pod that is not ready has no stream, and must not hold up the drain of a broken node.
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
        },
    }
