"""What the operator renders for each example, as golden files; runtime and router understand their arguments."""

import difflib
import importlib
import json
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from wherry_operator.api.generate import drift
from wherry_operator.api.kube import parse_duration
from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.v1alpha1 import Router, RouterPolicy
from wherry_operator.desired.common import RenderSettings
from wherry_operator.desired.objects import Desired, render
from wherry_operator.desired.router import router_args
from wherry_operator.desired.runtime import Origin, pod, worker_config
from wherry_protocol.engine_config import from_args

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = Path(__file__).parent / "golden"
EXAMPLES = sorted((ROOT / "examples").glob("*.yaml"))
SETTINGS = RenderSettings("example.com/wherry-runtime:1", "example.com/wherry-router:1")


def owner_of(path: Path) -> LLMDeployment:
    raw = yaml.safe_load(path.read_text())
    raw["metadata"] |= {"namespace": "default", "uid": "00000000-0000-0000-0000-000000000000"}
    return LLMDeployment.from_raw(raw)


def rendered(path: Path) -> tuple[LLMDeployment, Desired]:
    owner = owner_of(path)
    return owner, render(owner, SETTINGS, "token")


def as_yaml(objects: list[dict[str, Any]]) -> str:
    # Through JSON, so that shared parts are written out and not as aliases.
    return yaml.safe_dump_all(json.loads(json.dumps(objects)), sort_keys=False, width=120)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_golden(path: Path, regenerate: bool) -> None:
    owner, desired = rendered(path)
    assert owner.spec is not None
    leader = Origin(leader="10.0.0.1")
    pods = [pod(owner, desired.template, "abcde", index, leader) for index in range(owner.spec.parallelism.pods)]
    text = as_yaml([desired.secret, *desired.applied, *pods])
    golden = GOLDEN / path.name
    if regenerate:
        golden.parent.mkdir(exist_ok=True)
        golden.write_text(text)
    old = golden.read_text()
    difference = "".join(difflib.unified_diff(old.splitlines(True), text.splitlines(True), str(golden), "rendered"))
    assert not difference, f"{difference}\nrun `make generate` if this is meant"


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_runtime_understands_its_arguments(path: Path) -> None:
    owner, desired = rendered(path)
    assert owner.spec is not None
    [container] = desired.template["spec"]["containers"]
    assert from_args(container["args"]) == worker_config(owner, owner.spec)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_router_understands_its_arguments(path: Path) -> None:
    module = importlib.import_module("wherry_router.__main__")
    owner = owner_of(path)
    assert owner.spec is not None
    settings = module.argument_parser().parse_args(router_args(owner, owner.spec))
    assert (settings.deployment, settings.namespace, settings.model) == (owner.name, "default", owner.spec.model.name)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_router_queues_as_the_spec_says(path: Path) -> None:
    parser = importlib.import_module("wherry_router.__main__").argument_parser()
    flags = importlib.import_module("wherry_router.admission.flags")
    owner = owner_of(path)
    assert owner.spec is not None
    told = flags.settings(parser.parse_args(router_args(owner, owner.spec)))
    said = owner.spec.router
    assert [(c.name, c.priority, c.max_queued_requests, c.max_queued_tokens, c.default) for c in told.classes] == [
        (c.name, c.priority, c.max_queued_requests, c.max_queued_tokens, c.default) for c in said.priority_classes or ()
    ]
    assert (told.bounds.max_requests, told.bounds.max_tokens) == (said.queue.max_requests, said.queue.max_tokens)
    assert told.timeout_s == parse_duration(said.queue.timeout)
    assert told.bounds.no_replica_s == parse_duration(said.queue.start_timeout)


@pytest.mark.parametrize("policy", get_args(RouterPolicy))
def test_the_router_gets_the_policy_that_is_asked_for(policy: str) -> None:
    module = importlib.import_module("wherry_router.__main__")
    owner = owner_of(EXAMPLES[0])
    assert owner.spec is not None
    asked = owner.spec.model_copy(update={"router": owner.spec.router.model_copy(update={"policy": policy})})
    assert module.argument_parser().parse_args(router_args(owner, asked)).policy == policy


def test_operator_and_router_know_the_same_policies() -> None:
    policies = importlib.import_module("wherry_router.policies")
    assert list(get_args(RouterPolicy)) == list(policies.POLICIES)
    assert Router().policy == policies.DEFAULT


def test_generated_files_are_up_to_date() -> None:
    difference = drift()
    assert not difference, f"{difference}\nrun `make generate`"
