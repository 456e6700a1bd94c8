"""Turns pydantic's JSON schema into a structural schema: https://kubernetes.io/docs/tasks/extend-kubernetes/custom-resources/custom-resource-definitions/#specifying-a-structural-schema.

Pure: a model class in, plain data out.
"""

import copy
from typing import Any

from wherry_operator.api import rules
from wherry_operator.api.kube import CamelModel
from wherry_operator.api.v1alpha1 import GROUP, KIND, PLURAL, VERSION, LLMDeploymentSpec, LLMDeploymentStatus

COLUMNS = [
    ("Phase", "string", ".status.phase", 0),
    ("Ready", "integer", ".status.readyReplicas", 0),
    ("Desired", "integer", ".status.desiredReplicas", 0),
    ("Up-to-date", "integer", ".status.updatedReplicas", 0),
    ("Model", "string", ".spec.model.name", 0),
    ("URL", "string", ".status.url", 0),
    ("Age", "date", ".metadata.creationTimestamp", 0),
    ("Reason", "string", ".status.conditions[?(@.type=='Ready')].reason", 1),
]


def structural(model: type[CamelModel]) -> dict[str, Any]:
    """The structural schema of `model`: no $ref, no null, no titles, int-or-string marked as such."""
    schema = model.model_json_schema(by_alias=True)
    definitions = schema.pop("$defs", {})
    result = _convert(schema, definitions)
    if not isinstance(result, dict):
        raise TypeError(f"{model.__name__} has no object schema")
    return result


def _convert(node: Any, definitions: dict[str, Any]) -> Any:
    if isinstance(node, list):
        return [_convert(item, definitions) for item in node]
    if not isinstance(node, dict):
        return node
    node = _inline(copy.deepcopy(node), definitions)
    node.pop("title", None)
    if node.get("default", ...) is None:
        del node["default"]
    if node.get("x-kubernetes-preserve-unknown-fields"):
        node.pop("additionalProperties", None)
    if node.get("type", ...) is None:
        del node["type"]
    if node.get("type") == "object" and "maxLength" in node:
        node["maxProperties"] = node.pop("maxLength")
    return {
        # Names of properties are not keywords, so they are not looked at.
        key: {name: _convert(value, definitions) for name, value in value.items()}
        if key == "properties"
        else value
        if key in ("default", "x-kubernetes-validations")
        else _convert(value, definitions)
        for key, value in node.items()
    }


def _inline(node: dict[str, Any], definitions: dict[str, Any]) -> dict[str, Any]:
    """Resolves `$ref` and `X | None` into the thing itself; what stands beside them (descriptions, rules) wins."""
    while True:
        if reference := node.pop("$ref", None):
            node = copy.deepcopy(definitions[reference.rsplit("/", 1)[1]]) | node
            continue
        options = [o for o in node.get("anyOf", []) if o.get("type") != "null"]
        if "anyOf" in node and len(options) == 1:
            node = options[0] | {key: value for key, value in node.items() if key != "anyOf"}
            continue
        if "anyOf" in node and len(options) < len(node["anyOf"]):
            node["anyOf"] = options
        return node


def crd() -> dict[str, Any]:
    """The CustomResourceDefinition of LLMDeployment."""
    schema = {
        "type": "object",
        "description": "A large language model, served by a number of replicas behind one address that speaks the "
        "OpenAI API.",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"type": "string", "description": "Version of the API: inference.wherry.dev/v1alpha1."},
            "kind": {"type": "string", "description": "LLMDeployment."},
            "metadata": {"type": "object"},
            "spec": structural(LLMDeploymentSpec) | rules.SPEC,
            "status": structural(LLMDeploymentStatus),
        },
        **rules.ROOT,
    }
    columns = [
        {"name": name, "type": kind, "jsonPath": path} | ({"priority": priority} if priority else {})
        for name, kind, path, priority in COLUMNS
    ]
    version = {
        "name": VERSION,
        "served": True,
        "storage": True,
        "schema": {"openAPIV3Schema": schema},
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "additionalPrinterColumns": columns,
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {
            "name": f"{PLURAL}.{GROUP}",
            "labels": {"app.kubernetes.io/name": "wherry", "app.kubernetes.io/part-of": "wherry"},
        },
        "spec": {
            "group": GROUP,
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": KIND.lower(),
                "shortNames": ["llmd"],
                "categories": ["all"],
            },
            "scope": "Namespaced",
            "versions": [version],
        },
    }
