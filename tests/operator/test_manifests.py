"""Bad manifests: what the API server answers, or which condition appears. None of them harms the operator."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
from tests.operator.harness import Kube, Kubelet, OperatorProcess, eventually, manifest, running, unschedulable, waiting

LIMITS = {"limits": {"memory": "1Gi"}}


def template(**spec: Any) -> dict[str, Any]:
    return {"podTemplate": {"spec": spec}}


@dataclass
class Refused:
    """The API server's answer must hold `message`."""

    name: str
    spec: dict[str, Any]
    message: str
    metadata_name: str = "chat"


REFUSED = [
    Refused("no model", {"model": None}, "spec.model: Required value"),
    Refused("no model name", {"model": {"uri": "sample://tiny"}}, "spec.model.name: Required value"),
    Refused("no uri", {"model": {"name": "tiny"}}, "spec.model.uri: Required value"),
    Refused("model name with spaces", {"model": {"name": "a b", "uri": "sample://tiny"}}, "spec.model.name"),
    Refused("hub without a name", {"model": {"name": "a", "uri": "hf://org"}}, "hf://ORG/NAME@REVISION"),
    Refused("bucket in capitals", {"model": {"name": "a", "uri": "s3://Bucket/x"}}, "s3://BUCKET/PREFIX"),
    Refused("no checksum", {"model": {"name": "a", "uri": "https://h/a.gguf"}}, "https://HOST/FILE.gguf#sha256=HEX"),
    Refused(
        "password in a URI",
        {"model": {"name": "a", "uri": f"https://u:p@h/a.gguf#sha256={'0' * 64}"}},
        "credentials belong into model.secretName",
    ),
    Refused("repository in capitals", {"model": {"name": "a", "uri": "oci://r/Model:v1"}}, "oci://REGISTRY/REPOSITORY"),
    Refused(
        "secret for a sample",
        {"model": {"name": "a", "uri": "sample://tiny", "secretName": "s"}},
        "model.secretName is for models that are downloaded",
    ),
    Refused("cache for a sample", {"modelCache": {"sizeLimit": "1Gi"}}, "modelCache is for models that are downloaded"),
    Refused(
        "two caches",
        {"model": {"name": "a", "uri": "hf://o/n"}, "modelCache": {"claimName": "c", "hostPath": "/c"}},
        "one of sizeLimit, claimName and hostPath",
    ),
    Refused("unknown scheme", {"model": {"name": "a", "uri": "ftp://a"}}, "must start with hf://, s3://, https://"),
    Refused("plain path", {"model": {"name": "a", "uri": "/models/a"}}, "must start with hf://, s3://, https://"),
    Refused("file with two slashes", {"model": {"name": "a", "uri": "file://models/a"}}, "three slashes"),
    Refused("claim in capitals", {"model": {"name": "a", "uri": "pvc://Claim/x"}}, "pvc://CLAIM/PATH"),
    Refused("sample with a path", {"model": {"name": "a", "uri": "sample://a/b"}}, "sample://NAME"),
    Refused("path that climbs", {"model": {"name": "a", "uri": "pvc://claim/../x"}}, "must not contain '..'"),
    Refused("replicas and scaling", {"replicas": 2, "scaling": {"maxReplicas": 3}}, "exclude each other"),
    Refused("negative replicas", {"replicas": -1}, "should be greater than or equal to 0"),
    Refused("too many replicas", {"replicas": 5000}, "should be less than or equal to 1000"),
    Refused("replicas as text", {"replicas": "two"}, "must be of type integer"),
    Refused("scaling without maximum", {"scaling": {"minReplicas": 1}}, "spec.scaling.maxReplicas: Required value"),
    Refused(
        "minimum over maximum",
        {"scaling": {"minReplicas": 4, "maxReplicas": 2}},
        "must not be above scaling.maxReplicas",
    ),
    Refused(
        "scale to zero comes later", {"scaling": {"minReplicas": 0, "maxReplicas": 2}}, "greater than or equal to 1"
    ),
    Refused("no target", {"scaling": {"maxReplicas": 2, "targets": {}}}, "needs requestsPerReplica or kvUtilization"),
    Refused("no rollout possible", {"rolloutStrategy": {"maxSurge": 0, "maxUnavailable": "0%"}}, "raise one of them"),
    Refused("percentage over 100", {"rolloutStrategy": {"maxSurge": "150%"}}, "spec.rolloutStrategy.maxSurge"),
    Refused("odd duration", {"rolloutStrategy": {"drainTimeout": "5 minutes"}}, "spec.rolloutStrategy.drainTimeout"),
    Refused("endless drain", {"rolloutStrategy": {"drainTimeout": "5h"}}, "at most 1h"),
    Refused("no default class", {"router": {"priorityClasses": [{"name": "a"}]}}, "exactly one of priorityClasses"),
    Refused(
        "two classes of one name",
        {"router": {"priorityClasses": [{"name": "a", "default": True}, {"name": "a", "priority": 1}]}},
        "Duplicate value",
    ),
    Refused(
        "two classes of one priority",
        {"router": {"priorityClasses": [{"name": "a", "default": True}, {"name": "b"}]}},
        "the same priority",
    ),
    Refused("a class in capitals", {"router": {"priorityClasses": [{"name": "A", "default": True}]}}, "should match"),
    Refused("a cache that holds nothing", {"router": {"responseCache": {"size": "1000"}}}, "at least 1Mi"),
    Refused("answers kept for a year", {"router": {"responseCache": {"ttl": "8760h"}}}, "ttl must be from"),
    Refused("a cache in no Redis", {"router": {"responseCache": {"redis": {}}}}, "needs either url or secretName"),
    Refused(
        "a key in the open",
        {"router": {"responseCache": {"semantic": {"url": "https://key@e/v1/embeddings"}}}},
        "responseCache.semantic.url",
    ),
    Refused("meaning from nowhere", {"router": {"responseCache": {"semantic": {}}}}, "semantic.url: Required"),
    Refused(
        "everything means the same",
        {"router": {"responseCache": {"semantic": {"url": "http://e", "similarityThreshold": 0.1}}}},
        "greater than or equal to 0.5",
    ),
    Refused(
        "a slow embedding",
        {"router": {"responseCache": {"semantic": {"url": "http://e", "timeout": "1m"}}}},
        "timeout must be from 10ms to 5s",
    ),
    Refused("a queue for hours", {"router": {"queue": {"startTimeout": "2h"}}}, "at most 1h"),
    Refused("ranks that do not fill pods", {"parallelism": {"tensor": 4, "ranksPerPod": 3}}, "must divide"),
    Refused("more ranks in a pod than there are", {"parallelism": {"ranksPerPod": 2}}, "must divide"),
    Refused("no rank", {"parallelism": {"tensor": 0}}, "should be greater than or equal to 1"),
    Refused("too many ranks", {"parallelism": {"tensor": 65}}, "should be less than or equal to 64"),
    Refused("hasty failover", {"failover": {"nodeUnreachable": "1s"}}, "from 2s to 5m"),
    Refused("patient failover", {"failover": {"nodeUnreachable": "10m"}}, "from 2s to 5m"),
    Refused("negative restarts", {"failover": {"maxGroupRestarts": -1}}, "should be greater than or equal to 0"),
    Refused("auth of nothing", {"router": {"auth": {}}}, "needs secretName or oidc"),
    Refused("oidc without an audience", {"router": {"auth": {"oidc": {"issuer": "https://a"}}}}, "audience: Required"),
    Refused("issuer that is no URL", {"router": {"auth": {"oidc": {"issuer": "a", "audience": "b"}}}}, "oidc.issuer"),
    Refused("Redis nowhere", {"router": {"limits": {"redis": {}}}}, "needs either url or secretName"),
    Refused("Redis twice", {"router": {"limits": {"redis": {"url": "redis://a", "secretName": "b"}}}}, "needs either"),
    Refused("password in the open", {"router": {"limits": {"redis": {"url": "redis://:x@a"}}}}, "limits.redis.url"),
    Refused("a limit of nothing", {"router": {"limits": {"total": {"concurrent": 0}}}}, "greater than or equal to 1"),
    Refused("worker TLS without a Secret", {"workerTLS": {}}, "secretName: Required"),
    Refused("TLS without a Secret", {"router": {"tls": {}}}, "secretName: Required"),
    Refused("odd quantity", {"resources": {"limits": {"memory": "1 Gi"}}}, "spec.resources.limits.memory"),
    Refused(
        "requests over limits",
        {"resources": LIMITS | {"requests": {"memory": "2Gi"}}},
        "must not be above resources.limits",
    ),
    Refused("unknown dtype", {"dtype": "int4"}, "Unsupported value"),
    Refused("unknown quantization", {"quantization": {"method": "gptq"}}, "Unsupported value"),
    Refused("unknown KV cache", {"quantization": {"kvCache": "int4"}}, "Unsupported value"),
    Refused("unknown field", {"replica": 2}, 'unknown field "spec.replica"'),
    Refused("field of later work", {"lora": []}, 'unknown field "spec.lora"'),
    Refused("toleration without sense", {"tolerations": [{"effect": "Sometimes"}]}, "Unsupported value"),
    Refused("pull secret twice", {"imagePullSecrets": [{"name": "a"}, {"name": "a"}]}, "Duplicate value"),
    Refused("long name", {}, "at most 40 characters", "a" * 41),
    Refused("name with a dot", {}, "metadata.name must be", "chat.v1"),
    Refused("name with a digit first", {}, "start with a letter", "1chat"),
]


@pytest.mark.parametrize("case", REFUSED, ids=lambda case: case.name)
def test_the_api_server_refuses(kube_shared: Kube, case: Refused) -> None:
    body = manifest(case.metadata_name, **case.spec)
    body["spec"] = {key: value for key, value in body["spec"].items() if value is not None}
    status, message = kube_shared.try_create("llmdeployments", body)
    assert status in (400, 422)
    assert case.message in message


@dataclass
class Condition:
    """The condition `type` must become `status` for `reason`, with `message`."""

    name: str
    spec: dict[str, Any]
    reason: str
    message: str
    type: str = "Degraded"
    behaviour: Callable[[dict[str, Any]], dict[str, Any] | None] | None = None
    more: dict[str, str] = field(default_factory=dict)


CRASH = {"terminated": {"exitCode": 1, "reason": "Error", "message": "unknown architecture 'Foo'; known: Llama, Qwen2"}}
OOM = {"terminated": {"exitCode": 137, "reason": "OOMKilled"}}
CONDITIONS = [
    Condition("container without a name", template(containers=[{"image": "x"}]), "InvalidSpec", "needs 'name'"),
    Condition("containers as a map", template(containers={}), "InvalidSpec", "must be a list"),
    Condition("side car without image", template(containers=[{"name": "side"}]), "InvalidSpec", "without an image"),
    Condition(
        "removes the engine",
        template(containers=[{"name": "runtime", "$patch": "delete"}]),
        "InvalidSpec",
        "removes the container 'runtime'",
    ),
    Condition("restart policy", template(restartPolicy="Never"), "InvalidSpec", "runtime pods need Always"),
    Condition(
        "unknown volume",
        template(containers=[{"name": "runtime", "volumeMounts": [{"name": "x", "mountPath": "/x"}]}]),
        "InvalidPod",
        "Not found",
    ),
    Condition(
        "privileged",
        template(containers=[{"name": "runtime", "securityContext": {"privileged": True}}]),
        "InvalidPod",
        "cannot set `allowPrivilegeEscalation` to false",
    ),
    Condition("host network", template(hostNetwork=True), "Forbidden", "violates PodSecurity"),
    Condition("odd affinity", {"affinity": {"nodeAffinity": 3}}, "InvalidPod", "nodeAffinity"),
    Condition(
        "unknown priority", template(priorityClassName="nope"), "Forbidden", "no PriorityClass with name nope was found"
    ),
    Condition(
        "image that is not there",
        {"image": "example.com/none:1"},
        "ImagePullFailed",
        "not found",
        behaviour=lambda _: waiting("ErrImagePull", "example.com/none:1: not found"),
    ),
    Condition(
        "model that is not there",
        {"model": {"name": "a", "uri": "sample://none"}},
        "CrashLoopBackOff",
        "known: Llama, Qwen2",
        behaviour=lambda _: waiting("CrashLoopBackOff", "back-off", restarts=3, lastState=CRASH),
    ),
    Condition(
        "model load, as ModelLoaded",
        {},
        "LoadFailed",
        "known: Llama, Qwen2",
        "ModelLoaded=False",
        lambda _: waiting("CrashLoopBackOff", "back-off", restarts=3, lastState=CRASH),
    ),
    Condition(
        "memory limit too small",
        {"resources": LIMITS},
        "OutOfMemory",
        "raise spec.resources.limits.memory",
        behaviour=lambda _: waiting("CrashLoopBackOff", "back-off", restarts=3, lastState=OOM),
    ),
    Condition(
        "no node has the memory",
        {"resources": {"limits": {"memory": "900Gi"}}},
        "Unschedulable",
        "Insufficient memory",
        "InsufficientCapacity",
        lambda _: unschedulable("0/3 nodes are available: 3 Insufficient memory."),
    ),
    Condition(
        "claim that is not there",
        {"model": {"name": "a", "uri": "pvc://none/x"}},
        "VolumeNotFound",
        '"none" not found',
        behaviour=lambda _: unschedulable('persistentvolumeclaim "none" not found'),
    ),
    Condition(
        "secret that is not there",
        template(containers=[{"name": "runtime", "envFrom": [{"secretRef": {"name": "none"}}]}]),
        "CreateContainerConfigError",
        'secret "none" not found',
        behaviour=lambda _: waiting("CreateContainerConfigError", 'secret "none" not found'),
    ),
]


@pytest.fixture(scope="module")
def kube_shared(plane: Any) -> Any:
    kube = Kube(plane, "default")
    yield kube
    kube.http.close()


def test_conditions_name_the_cause(kube: Kube, operator: OperatorProcess) -> None:
    """All at once in one namespace, so that a bad one would also show by holding up the others."""
    names = {f"case-{index}": case for index, case in enumerate(CONDITIONS)}
    label = "inference.wherry.dev/deployment"

    def behaviour(pod: dict[str, Any]) -> dict[str, Any] | None:
        case = names.get(pod["metadata"]["labels"][label])
        return case.behaviour(pod) if case and case.behaviour else None

    with Kubelet(kube, behaviour):
        for name, case in names.items():
            kube.deployment(name, **case.spec)
        for name, case in names.items():
            kind, _, status = case.type.partition("=")

            def found(name: str = name, kind: str = kind, case: Condition = case, status: str = status) -> bool:
                condition = kube.condition(kind, name)
                assert condition.get("reason") == case.reason, (case.name, condition)
                assert case.message in condition["message"], (case.name, condition)
                return bool(condition["status"] == (status or "True"))

            eventually(found, case.name)
            ready = kube.condition("Ready", name)
            assert ready["status"] == "False"
        assert operator.text().count("leading as") == 1
        kube.patch("llmdeployments", "case-0", {"spec": {"podTemplate": None}})
        eventually(lambda: kube.condition("Degraded", "case-0")["status"] == "False", "a mended one recovers")


def test_a_quota_is_named_and_waited_for(kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    hard = {"pods": "1"}
    kube.create("resourcequotas", {"metadata": {"name": "small"}, "spec": {"hard": hard}})
    kube.patch("resourcequotas", "small", {"status": {"hard": hard, "used": {"pods": "0"}}}, "status")
    kube.deployment(replicas=2)
    found = eventually(
        lambda: (c := kube.condition("InsufficientCapacity")).get("status") == "True" and c, "the quota is named"
    )
    assert found["reason"] == "QuotaExceeded"
    assert "exceeded quota: small" in found["message"]
    assert len(kube.runtime_pods()) == 1
    kube.delete("resourcequotas", "small")
    kube.wait_ready()


def test_a_taken_name_is_said_and_left_alone(kube: Kube, operator: OperatorProcess, kubelet: Kubelet) -> None:
    spec = {"ports": [{"port": 80}], "selector": {"app": "else"}}
    kube.create("services", {"metadata": {"name": "chat"}, "spec": spec})
    kube.deployment(replicas=1)
    found = eventually(lambda: (c := kube.condition("Degraded")).get("status") == "True" and c, "the conflict is named")
    assert found["reason"] == "NameConflict"
    assert "the Service 'chat' exists" in found["message"]
    assert kube.get("services", "chat")["spec"]["selector"] == {"app": "else"}
    kube.delete("services", "chat")
    kube.patch("llmdeployments", "chat", {"spec": {"replicas": 2}})
    kube.wait_ready()


def test_what_it_says_while_it_loads(kube: Kube, operator: OperatorProcess) -> None:
    with Kubelet(kube, lambda _: running("127.9.1.1", ready=False)) as kubelet:
        kube.deployment(replicas=1)
        eventually(lambda: kube.condition("ModelLoaded").get("reason") == "Loading", "it says that it loads")
        assert "is loading the model" in kube.condition("ModelLoaded")["message"]
        assert kube.condition("Degraded")["status"] == "False"
        assert kube.get("llmdeployments", "chat")["status"]["phase"] == "Pending"
        [pod] = kube.runtime_pods()
        kubelet.set_status(pod, running("127.9.1.1"))
        status = kube.wait_ready()["status"]
    assert (status["phase"], status["readyReplicas"], status["updatedReplicas"]) == ("Ready", 1, 1)
