"""LLMDeployment, version v1alpha1: the one place that says what it holds. `make generate` turns this into the CRD."""

from typing import Annotated, Any, Literal

from pydantic import Field

from wherry_operator.api import rules
from wherry_operator.api.access import RouterAuth, RouterLimits, RouterTls, WorkerTls
from wherry_operator.api.kube import (
    PRESERVE,
    CamelModel,
    Duration,
    Embedded,
    IntOrPercent,
    LocalObjectReference,
    Quantity,
    ResourceRequirements,
    Toleration,
    TopologySpreadConstraint,
)
from wherry_operator.api.model import Model, ModelCache
from wherry_operator.api.response_cache import ResponseCache

GROUP = "inference.wherry.dev"
VERSION = "v1alpha1"
API_VERSION = f"{GROUP}/{VERSION}"
KIND = "LLMDeployment"
PLURAL = "llmdeployments"

Replicas = Annotated[int, Field(ge=0, le=1000)]
# So that an object that leaves the whole block out gets the defaults inside it.
EMPTY: dict[str, Any] = {"default": {}}


class ScalingTargets(CamelModel):
    """What each replica should carry. With both set, the one that asks for more replicas decides."""

    requests_per_replica: int | None = Field(
        None,
        description="Requests, running and waiting together, that one replica should carry on average.",
        ge=1,
        le=100000,
    )
    kv_utilization: int | None = Field(
        None,
        description="Percentage of the KV cache that should be in use on average.",
        ge=1,
        le=100,
    )


class ScaleUp(CamelModel):
    """How the number of replicas grows."""

    stabilization_window: Duration = Field(
        "0s",
        description="How long a higher load must last before replicas are added, like 0s or 30s.",
        json_schema_extra=rules.WINDOW,
    )


class ScaleDown(CamelModel):
    """How the number of replicas shrinks."""

    stabilization_window: Duration = Field(
        "5m",
        description="How long a lower load must last before replicas are removed, like 5m.",
        json_schema_extra=rules.WINDOW,
    )


class ScalingBehavior(CamelModel):
    """How fast the number of replicas follows the load."""

    scale_up: ScaleUp = Field(default_factory=ScaleUp, description="Adding replicas.", json_schema_extra=EMPTY)
    scale_down: ScaleDown = Field(default_factory=ScaleDown, description="Removing replicas.", json_schema_extra=EMPTY)


class Scaling(CamelModel):
    """Lets the number of replicas follow the load."""

    min_replicas: int = Field(1, description="Replicas that always run.", ge=1, le=1000)
    max_replicas: int = Field(description="Replicas that run at most.", ge=1, le=1000)
    targets: ScalingTargets = Field(
        default_factory=lambda: ScalingTargets(requests_per_replica=16),
        description="The load that each replica should carry. Defaults to 16 requests.",
        json_schema_extra={"default": {"requestsPerReplica": 16}, **rules.TARGETS},
    )
    behavior: ScalingBehavior = Field(
        default_factory=ScalingBehavior,
        description="How fast the number of replicas follows the load.",
        json_schema_extra=EMPTY,
    )


class Quantization(CamelModel):
    """What is rounded to fewer bits, to take less memory and be read faster."""

    method: Literal["none", "int8", "int4"] = Field(
        "none",
        description="Rounds the weights of matrices as they are loaded; the checkpoint stays as it is. int8 takes half "
        "of bfloat16's memory and hardly changes answers; int4 takes less than a third and changes some.",
    )
    kv_cache: Literal["auto", "fp8", "int8"] = Field(
        "auto",
        description="Type of the KV cache; auto: that of the activations. fp8 and int8 hold about twice the tokens of "
        "bfloat16 in the same memory.",
    )
    measure: bool = Field(
        True,
        description="Whether each replica measures what rounding its weights costs once it is ready, for "
        "status.quantization: some seconds of a core per billion weights. Answers go first.",
    )


class Batching(CamelModel):
    """How an engine batches requests. What is left out gets the runtime's own default."""

    max_running: int | None = Field(
        None, description="Requests that run at once in one replica. Defaults to 64.", ge=1, le=4096
    )
    max_batched_tokens: int | None = Field(
        None,
        description="Tokens that one step computes at most; longer prompts are cut into chunks. Defaults to 2048.",
        ge=16,
        le=1048576,
    )
    max_model_len: int | None = Field(
        None,
        description="Tokens of prompt and answer together. Defaults to what the model was trained for.",
        ge=1,
        le=16777216,
    )
    max_queued: int | None = Field(
        None,
        description="Requests that may wait in one replica; over it clients get 429. Defaults to 256.",
        ge=0,
        le=100000,
    )
    kv_cache_memory: Quantity | None = Field(
        None,
        description="Memory for the KV cache of one replica, like 512Mi. Defaults to what the memory limit leaves.",
    )
    prefix_cache: bool | None = Field(
        None, description="Whether requests that start alike share their KV cache. Defaults to true."
    )


class PriorityClass(CamelModel):
    """Requests that are queued together."""

    name: str = Field(
        description="Name that clients write into x-wherry-priority: a-z, 0-9 and '-'; 63 at most.",
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        max_length=63,
    )
    priority: int = Field(
        0,
        description="Higher ones go first, and pause what runs of lower ones when there is no room beside them.",
        ge=-1000000,
        le=1000000,
    )
    max_queued_requests: int | None = Field(
        None,
        description="Requests of this class that may wait in one router. Defaults to queue.maxRequests.",
        ge=0,
        le=100000,
    )
    max_queued_tokens: int | None = Field(
        None,
        description="Their tokens of prompts and answers, estimated. Defaults to queue.maxTokens.",
        ge=0,
        le=1000000000,
    )
    default: bool = Field(False, description="Whether requests that name no class are of this one.")


class RouterQueue(CamelModel):
    """What waits in each router while the replicas are full. Over a bound the lowest class is refused with 429."""

    max_requests: int = Field(1000, description="Requests that wait at most.", ge=0, le=100000)
    max_tokens: int = Field(
        4000000,
        description="Their tokens of prompts and answers at most, estimated.",
        ge=0,
        le=1000000000,
    )
    timeout: Duration = Field(
        "1m",
        description="How long a request waits that does not say so in x-wherry-queue-timeout-ms.",
        json_schema_extra=rules.QUEUE_TIMEOUT,
    )
    start_timeout: Duration = Field(
        "30s",
        description="How long requests wait while no replica is ready, like during a start.",
        json_schema_extra=rules.QUEUE_TIMEOUT,
    )


RouterPolicy = Literal[
    "prefix-aware",
    "least-tokens",
    "least-requests",
    "power-of-two",
    "session-affinity",
    "round-robin",
    "random",
]


class Router(CamelModel):
    """The router in front of the replicas: it speaks the OpenAI API."""

    replicas: int = Field(1, description="Router pods.", ge=1, le=100)
    image: str | None = Field(
        None, description="Image of the router. Defaults to the operator's --router-image.", min_length=1
    )
    resources: ResourceRequirements | None = Field(
        None, description="CPU and memory of each router pod.", json_schema_extra=rules.RESOURCES
    )
    priority_classes: list[PriorityClass] | None = Field(
        None,
        description="Classes that requests may name. Without any there is one, called default.",
        min_length=1,
        max_length=16,
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["name"],
            **rules.PRIORITY_CLASSES,
        },
    )
    queue: RouterQueue = Field(
        default_factory=RouterQueue,
        description="What waits in each router while the replicas are full.",
        json_schema_extra=EMPTY,
    )
    response_cache: ResponseCache | None = Field(
        None, description="Keeps answers that are the same each time. Without it none is kept."
    )
    auth: RouterAuth | None = Field(
        None,
        description="Who may use the router. Without it: whoever reaches it.",
        json_schema_extra=rules.AUTH,
    )
    limits: RouterLimits | None = Field(None, description="How much clients may ask for.")
    tls: RouterTls | None = Field(None, description="TLS on the router's port. Without it: plain HTTP.")
    policy: RouterPolicy = Field(
        "prefix-aware",
        description="How the router chooses a replica for a request: by the prefix that replicas have cached weighed "
        "against their load, by load alone (fewest tokens or requests owed, or the better of two at random), by the "
        "client's session, in turns, or at random.",
    )


class RolloutStrategy(CamelModel):
    """How pods are exchanged when anything about them changes."""

    max_surge: IntOrPercent = Field(
        1, description="Pods above the wanted number during a rollout: a number, or a percentage rounded up."
    )
    max_unavailable: IntOrPercent = Field(
        0,
        description="Replicas that may be missing during a rollout: a number, or a percentage rounded down. With 0 a "
        "rollout waits for room for one more pod; set 1 where every accelerator is taken.",
    )
    drain_timeout: Duration = Field(
        "5m", description="How long a pod that is taken down may go on answering what it has begun."
    )


class Parallelism(CamelModel):
    """How one replica is split over ranks. A replica is a group of tensor / ranksPerPod pods."""

    tensor: int = Field(1, description="Ranks that share every layer of one replica (tensor parallelism).", ge=1, le=64)
    ranks_per_pod: int | None = Field(
        None,
        description="Ranks in one pod; must divide tensor. Defaults to tensor: all ranks of a replica in one pod. "
        "With 1 every rank has a pod of its own, and the pods may sit on different nodes.",
        ge=1,
        le=64,
    )

    @property
    def pods(self) -> int:
        """Pods in one group."""
        return self.tensor // (self.ranks_per_pod or self.tensor)


class Failover(CamelModel):
    """What happens when a part of a replica dies."""

    node_unreachable: Duration = Field(
        "5s",
        description="How long a pod must be out of reach, while its node shows no life either, before its replica is "
        "given up and replaced on another node; 2s to 5m.",
        json_schema_extra=rules.NODE_UNREACHABLE,
    )
    max_group_restarts: int = Field(
        5,
        description="How often a replica may crash and restart in place before it is replaced by a new one.",
        ge=0,
        le=1000,
    )
    resume: bool = Field(
        True,
        description="Whether the router goes on with a stream on another replica when the one that it ran on is lost.",
    )


class LLMDeploymentSpec(CamelModel):
    """What should run."""

    model: Model = Field(description="The model that is served.", json_schema_extra=rules.MODEL)
    model_cache: ModelCache | None = Field(
        None,
        description="Where downloaded models are kept. Without it: in an emptyDir, which lasts as long as the pod.",
        json_schema_extra=rules.MODEL_CACHE,
    )
    image: str | None = Field(
        None, description="Image of the runtime. Defaults to the operator's --runtime-image.", min_length=1
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Type of weights and activations; auto takes the model's own."
    )
    quantization: Quantization = Field(
        default_factory=Quantization,
        description="What is rounded to fewer bits, to take less memory and be read faster.",
        json_schema_extra=EMPTY,
    )
    replicas: Replicas | None = Field(
        None,
        description="How many replicas run; 0 stops them all. Defaults to 1. Not together with scaling. "
        "`kubectl scale` writes this field.",
    )
    scaling: Scaling | None = Field(
        None,
        description="Lets the number of replicas follow the load. Not together with replicas.",
        json_schema_extra=rules.SCALING,
    )
    parallelism: Parallelism = Field(
        default_factory=Parallelism,
        description="How one replica is split over ranks.",
        json_schema_extra=EMPTY | rules.PARALLELISM,
    )
    batching: Batching = Field(
        default_factory=Batching, description="How each engine batches requests.", json_schema_extra=EMPTY
    )
    router: Router = Field(
        default_factory=Router,
        description="The router in front of the replicas.",
        json_schema_extra=EMPTY,
    )
    rollout_strategy: RolloutStrategy = Field(
        default_factory=RolloutStrategy,
        description="How pods are exchanged when anything about them changes.",
        json_schema_extra={"default": {"maxSurge": 1, "maxUnavailable": 0, "drainTimeout": "5m"}} | rules.ROLLOUT,
    )
    failover: Failover = Field(
        default_factory=Failover,
        description="What happens when a part of a replica dies.",
        json_schema_extra=EMPTY,
    )
    worker_tls: WorkerTls | None = Field(
        None,
        alias="workerTLS",
        description="Mutual TLS between routers and workers. Without it: plain HTTP, guarded by a token.",
    )
    resources: ResourceRequirements | None = Field(
        None,
        description="CPU, memory and accelerators of each runtime pod. The memory limit must hold the weights and the "
        "KV cache.",
        json_schema_extra=rules.RESOURCES,
    )
    node_selector: dict[str, str] | None = Field(
        None, description="Node labels that a node must carry to run runtime pods."
    )
    tolerations: list[Toleration] | None = Field(
        None,
        description="Node taints that runtime pods put up with.",
        max_length=64,
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    affinity: Embedded | None = Field(
        None, description="Affinity of runtime pods, as in a pod's spec.", json_schema_extra=PRESERVE
    )
    topology_spread_constraints: list[TopologySpreadConstraint] | None = Field(
        None,
        description="How evenly runtime pods spread over nodes or zones. Defaults to over nodes, where possible.",
        max_length=16,
        json_schema_extra={
            "x-kubernetes-list-type": "map",
            "x-kubernetes-list-map-keys": ["topologyKey", "whenUnsatisfiable"],
        },
    )
    image_pull_secrets: list[LocalObjectReference] | None = Field(
        None,
        description="Secrets with credentials for the images' registry, for runtime and router pods.",
        max_length=16,
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["name"]},
    )
    pod_template: Embedded | None = Field(
        None,
        description="Anything else about runtime pods: metadata and spec as in a pod template, merged over what "
        "Wherry makes. Lists merge by name; the engine's container is named runtime.",
        json_schema_extra=PRESERVE,
    )

    @property
    def fixed_replicas(self) -> int | None:
        """The replicas asked for, or None when scaling decides."""
        if self.scaling is not None:
            return None
        return 1 if self.replicas is None else self.replicas


class Condition(CamelModel):
    """One aspect of the state, after Kubernetes' metav1.Condition."""

    type: str = Field(description="The aspect, like Ready.")
    status: Literal["True", "False", "Unknown"] = Field(description="True, False or Unknown.")
    reason: str = Field(description="One word that says why.")
    message: str = Field(description="The cause and what to do about it.")
    last_transition_time: str = Field(
        description="When status last changed.", json_schema_extra={"format": "date-time"}
    )
    observed_generation: int = Field(description="The metadata.generation that this was judged on.")


class PendingAction(CamelModel):
    """Something that the operator will do once it can."""

    action: str = Field(description="What: CreatePod, DeletePod, ApplyObject or Wait.")
    target: str = Field(description="The object that it is about.")
    reason: str = Field(description="Why, and what it waits for.")


class OperatorInfo(CamelModel):
    """The operator that wrote this status; `wherry plan` renders with the same settings."""

    version: str = Field(description="Version of Wherry.")
    runtime_image: str = Field(description="Its --runtime-image.")
    router_image: str = Field(description="Its --router-image.")
    sees_nodes: bool | None = Field(
        None, description="Whether it may see nodes, and so moves replicas away from those that are being emptied."
    )


class QuantizationStatus(CamelModel):
    """What rounding weights as they are loaded costs, as a replica measured it on a short built-in text once it was
    ready. `wherry eval kl` measures on yours."""

    method: str = Field(description="spec.quantization.method that it is about.")
    revision: str | None = Field(None, description="Hash of the pod template whose pods measured it.")
    divergence: str | None = Field(
        None,
        description="Mean Kullback-Leibler divergence from the model as it was, in nats per token; 0.01 is about as "
        "bad as 1% of perplexity.",
    )
    perplexity_change: str | None = Field(
        None, description="Change of perplexity. On so short a text it says less than the divergence."
    )
    tokens: int | None = Field(None, description="Tokens that were looked at.")
    message: str | None = Field(None, description="The figures in words, or why there are none.")


class LLMDeploymentStatus(CamelModel):
    """What runs now."""

    phase: str | None = Field(
        None, description="One word for people: Pending, Progressing, Ready, Degraded, Stopped or Terminating."
    )
    observed_generation: int | None = Field(None, description="The metadata.generation that this status is about.")
    desired_replicas: int | None = Field(None, description="Replicas that should run.")
    replicas: int | None = Field(None, description="Replicas that exist.")
    ready_replicas: int | None = Field(None, description="Replicas that can answer requests.")
    updated_replicas: int | None = Field(None, description="Replicas made from the current spec.")
    revision: str | None = Field(None, description="Hash of the current pod template.")
    selector: str | None = Field(None, description="Label selector of the runtime pods.")
    url: str | None = Field(None, description="Base URL of the OpenAI API inside the cluster, without /v1.")
    operator: OperatorInfo | None = Field(None, description="The operator that wrote this status.")
    quantization: QuantizationStatus | None = Field(
        None, description="What spec.quantization.method costs; absent where nothing is rounded."
    )
    plan: list[PendingAction] | None = Field(
        None,
        description="What the operator still has to do, and what each step waits for.",
        json_schema_extra={"x-kubernetes-list-type": "atomic"},
    )
    conditions: list[Condition] | None = Field(
        None,
        description="The state, aspect by aspect.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )
