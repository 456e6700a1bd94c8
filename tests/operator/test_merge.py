"""Strategic merge of pod templates."""

import copy
from typing import Any

import pytest

from wherry_operator.desired.merge import MergeError, strategic_merge

BASE = {
    "metadata": {"labels": {"a": "1"}},
    "spec": {
        "containers": [
            {"name": "runtime", "image": "x", "args": ["--a"], "env": [{"name": "A", "value": "1"}, {"name": "B"}]}
        ],
        "volumes": [{"name": "tmp", "emptyDir": {}}],
        "tolerations": [{"key": "k"}],
        "securityContext": {"runAsNonRoot": True},
    },
}


@pytest.mark.parametrize(
    "patch, path, expected",
    [
        ({"metadata": {"labels": {"b": "2"}}}, "metadata.labels", {"a": "1", "b": "2"}),
        ({"metadata": {"labels": {"a": None}}}, "metadata.labels", {}),
        ({"spec": {"nodeName": "n"}}, "spec.nodeName", "n"),
        ({"spec": {"containers": [{"name": "runtime", "image": "y"}]}}, "spec.containers.0.image", "y"),
        ({"spec": {"containers": [{"name": "runtime", "image": "y"}]}}, "spec.containers.0.args", ["--a"]),
        ({"spec": {"containers": [{"name": "runtime", "args": ["--b"]}]}}, "spec.containers.0.args", ["--b"]),
        (
            {"spec": {"containers": [{"name": "side", "image": "z"}]}},
            "spec.containers.1",
            {"name": "side", "image": "z"},
        ),
        (
            {"spec": {"containers": [{"name": "runtime", "env": [{"name": "A", "value": "2"}, {"name": "C"}]}]}},
            "spec.containers.0.env",
            [{"name": "A", "value": "2"}, {"name": "B"}, {"name": "C"}],
        ),
        (
            {"spec": {"containers": [{"name": "runtime", "env": [{"name": "A", "$patch": "delete"}]}]}},
            "spec.containers.0.env",
            [{"name": "B"}],
        ),
        (
            {"spec": {"volumes": [{"name": "tmp", "emptyDir": {"medium": "Memory"}}]}},
            "spec.volumes.0.emptyDir.medium",
            "Memory",
        ),
        ({"spec": {"volumes": [{"name": "v"}]}}, "spec.volumes", [{"name": "tmp", "emptyDir": {}}, {"name": "v"}]),
        ({"spec": {"tolerations": [{"key": "other"}]}}, "spec.tolerations", [{"key": "other"}]),
        ({"spec": {"securityContext": {"$patch": "replace", "fsGroup": 1}}}, "spec.securityContext", {"fsGroup": 1}),
    ],
)
def test_merge(patch: dict[str, Any], path: str, expected: Any) -> None:
    base, given = copy.deepcopy(BASE), copy.deepcopy(patch)
    result: Any = strategic_merge(base, given)
    for part in path.split("."):
        result = result[int(part)] if part.isdigit() else result[part]
    assert result == expected
    assert (base, given) == (BASE, patch), "the inputs were changed"


@pytest.mark.parametrize(
    "patch, message",
    [
        ({"spec": []}, "podTemplate.spec must be an object, not a list"),
        ({"spec": {"containers": {}}}, "podTemplate.spec.containers must be a list, not an object"),
        ({"spec": {"containers": [{"image": "x"}]}}, r"podTemplate.spec.containers\[0\] needs 'name'"),
        ({"spec": {"containers": ["x"]}}, r"podTemplate.spec.containers\[0\] needs 'name'"),
        ({"spec": {"volumes": "x"}}, "podTemplate.spec.volumes must be a list"),
        ({"spec": {"containers": [{"name": "runtime", "env": {}}]}}, r"containers\[runtime\].env must be a list"),
        ({"spec": {"tolerations": "all"}}, "podTemplate.spec.tolerations must be a list, not text"),
    ],
)
def test_shapes_that_do_not_fit(patch: dict[str, Any], message: str) -> None:
    with pytest.raises(MergeError, match=message):
        strategic_merge(BASE, patch)
