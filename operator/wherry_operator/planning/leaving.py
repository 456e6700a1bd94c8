"""Nodes that are being emptied (`kubectl drain`, a cluster autoscaler) and the groups that have to leave them. Pure."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from wherry_operator.planning.group import GroupView

# Taints that announce the end of a node. Others say who may come, and nothing about who has to go.
LEAVING_TAINTS = (
    "ToBeDeletedByClusterAutoscaler",
    "karpenter.sh/disrupted",
    "karpenter.sh/disruption",
    "node.kubernetes.io/unschedulable",
)


def leaving(nodes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The nodes that are cordoned or about to be removed, by name, each with the words that say so."""
    found = {}
    for node in nodes:
        name, spec = node["metadata"]["name"], node.get("spec") or {}
        taints = [taint.get("key") for taint in spec.get("taints") or []]
        if spec.get("unschedulable"):
            found[name] = f"its node {name} is cordoned"
        elif key := next((key for key in taints if key in LEAVING_TAINTS), None):
            found[name] = f"its node {name} has the taint {key}"
    return found


def moving(groups: Sequence[GroupView], nodes: Mapping[str, str]) -> dict[str, str]:
    """The groups with a pod on such a node, by key, and why they have to move."""
    found = ((group.key, sorted(group.nodes & nodes.keys())) for group in groups)
    return {key: nodes[names[0]] for key, names in found if names}
