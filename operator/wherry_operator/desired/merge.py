"""Strategic merge of a pod template: maps merge, lists of named things merge by their name, all else is replaced.

After https://kubernetes.io/docs/tasks/manage-kubernetes-objects/update-api-object-kubectl-patch/ (null deletes a key;
`$patch: delete` deletes an entry and `$patch: replace` replaces one). Pure.
"""

import copy
from typing import Any

# The field that tells entries of a list apart, by the list's own name.
MERGE_KEYS = {
    "containers": "name",
    "initContainers": "name",
    "env": "name",
    "volumes": "name",
    "volumeMounts": "mountPath",
    "volumeDevices": "devicePath",
    "ports": "containerPort",
    "imagePullSecrets": "name",
    "hostAliases": "ip",
    "topologySpreadConstraints": "topologyKey",
    "resourceClaims": "name",
    "schedulingGates": "name",
    "readinessGates": "conditionType",
}


class MergeError(ValueError):
    """The patch does not fit what it is merged over. The text names the path."""


def strategic_merge(base: dict[str, Any], patch: dict[str, Any], path: str = "podTemplate") -> dict[str, Any]:
    """A new map: `patch` merged over `base`. Neither is changed.

    Raises:
        MergeError: the two have different shapes at some path, or an entry of a keyed list lacks its key.
    """
    if patch.get("$patch") == "replace":
        return {key: copy.deepcopy(value) for key, value in patch.items() if key != "$patch"}
    result = copy.deepcopy(base)
    for key, value in patch.items():
        where = f"{path}.{key}"
        if value is None:
            result.pop(key, None)
        elif isinstance(value, dict):
            if not isinstance(old := result.get(key) or {}, dict):
                raise MergeError(f"{where} must be {_kind(old)}, not an object")
            result[key] = strategic_merge(old, value, where)
        elif isinstance(value, list) and key in MERGE_KEYS:
            if not isinstance(old := result.get(key) or [], list):
                raise MergeError(f"{where} must be {_kind(old)}, not a list")
            result[key] = _merge_list(old, value, MERGE_KEYS[key], where)
        elif isinstance(result.get(key), dict) or (isinstance(result.get(key), list) and not isinstance(value, list)):
            raise MergeError(f"{where} must be {_kind(result[key])}, not {_kind(value)}")
        else:
            result[key] = copy.deepcopy(value)
    return result


def _merge_list(base: list[Any], patch: list[Any], key: str, path: str) -> list[Any]:
    result = list(base)
    for index, entry in enumerate(patch):
        if not isinstance(entry, dict) or key not in entry:
            raise MergeError(f"{path}[{index}] needs {key!r}, which tells the entries of this list apart")
        at = next((i for i, old in enumerate(result) if old.get(key) == entry[key]), None)
        if entry.get("$patch") == "delete":
            result = [old for old in result if old.get(key) != entry[key]]
        elif at is None:
            result.append(strategic_merge({}, entry, f"{path}[{entry[key]}]"))
        else:
            result[at] = strategic_merge(result[at], entry, f"{path}[{entry[key]}]")
    return result


def _kind(value: Any) -> str:
    kinds = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return kinds.get(type(value), type(value).__name__)
