"""A container's environment, resolved as the kubelet does."""

import re
from collections.abc import Awaitable, Callable, Mapping
from decimal import ROUND_CEILING
from typing import Any

from wherry_local.node.mounts import expand
from wherry_protocol.quantity import parse_quantity

Object = dict[str, Any]
# (kind, name) → data, or None where there is no such object in the pod's namespace.
Lookup = Callable[[str, str], Awaitable[Mapping[str, str] | None]]


class ConfigError(Exception):
    """A reference that does not resolve; becomes CreateContainerConfigError with this message."""


def field(pod: Object, path: str, pod_ip: str, host_ip: str) -> str:
    """The value of a downward API `fieldRef`. Raises ConfigError for a path it does not know."""
    metadata, spec = pod["metadata"], pod["spec"]
    if match := re.fullmatch(r"metadata\.(labels|annotations)\['(.+)'\]", path):
        return str((metadata.get(match[1]) or {}).get(match[2], ""))
    if path in ("metadata.labels", "metadata.annotations"):
        values = metadata.get(path.removeprefix("metadata.")) or {}
        return "\n".join(f'{key}="{value}"' for key, value in sorted(values.items()))
    known = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", ""),
        "status.hostIP": host_ip,
        "status.hostIPs": host_ip,
        "status.podIP": pod_ip,
        "status.podIPs": pod_ip,
    }
    if path not in known:
        raise ConfigError(f"fieldRef {path!r} is not known; known are {', '.join(sorted(known))}")
    return str(known[path])


def resource_field(pod: Object, container: Object, reference: Object, allocatable: Mapping[str, str]) -> str:
    """The value of a `resourceFieldRef`; a missing limit is the node's allocatable amount, as in Kubernetes."""
    name = reference.get("containerName")
    if name:
        container = next((c for c in pod["spec"]["containers"] if c["name"] == name), container)
    part, _, resource = reference["resource"].partition(".")
    values = container.get("resources", {}).get(part) or {}
    amount = values.get(resource) or (allocatable.get(resource, "0") if part == "limits" else "0")
    divisor = parse_quantity(reference.get("divisor") or "1") or 1
    return str(int((parse_quantity(amount) / divisor).to_integral_value(ROUND_CEILING)))


async def _reference(
    pod: Object, container: Object, item: Object, lookup: Lookup, facts: Mapping[str, Any]
) -> str | None:
    source = item["valueFrom"]
    if ref := source.get("fieldRef"):
        return field(pod, ref["fieldPath"], facts["pod_ip"], facts["host_ip"])
    if ref := source.get("resourceFieldRef"):
        return resource_field(pod, container, ref, facts["allocatable"])
    for key, kind in (("secretKeyRef", "secret"), ("configMapKeyRef", "configmap")):
        if ref := source.get(key):
            data = await lookup(kind, ref["name"])
            if data is not None and ref["key"] in data:
                return data[ref["key"]]
            if ref.get("optional"):
                return None
            if data is None:
                raise ConfigError(f'{kind} "{ref["name"]}" not found')
            raise ConfigError(f"couldn't find key {ref['key']} in {kind} {pod['metadata']['namespace']}/{ref['name']}")
    raise ConfigError(f"env {item['name']!r}: this valueFrom is not known in local mode: {sorted(source)}")


async def resolve(pod: Object, container: Object, lookup: Lookup, facts: Mapping[str, Any]) -> dict[str, str]:
    """Variables of `envFrom` and `env`, in that order, later ones seeing earlier ones by `$(NAME)`.

    `facts` holds pod_ip, host_ip, allocatable (resource → quantity) and base (variables every container has).
    Raises ConfigError when a reference that is not optional does not resolve.
    """
    result: dict[str, str] = dict(facts.get("base") or {})
    for source in container.get("envFrom") or []:
        kind, ref = ("secret", source["secretRef"]) if "secretRef" in source else ("configmap", source["configMapRef"])
        data = await lookup(kind, ref["name"])
        if data is None:
            if ref.get("optional"):
                continue
            raise ConfigError(f'{kind} "{ref["name"]}" not found')
        result |= {source.get("prefix", "") + key: value for key, value in data.items()}
    for item in container.get("env") or []:
        if "valueFrom" in item:
            value = await _reference(pod, container, item, lookup, facts)
            if value is not None:
                result[item["name"]] = value
        else:
            result[item["name"]] = expand(item.get("value", ""), result)
    return result
