"""The operator's metrics; docs/reference and the dashboards are written from this one list."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY = CollectorRegistry()

RECONCILES = Counter(
    "wherry_operator_reconciles", "Reconciliations, by result: ok, requeued or error.", ["result"], registry=REGISTRY
)
RECONCILE_SECONDS = Histogram(
    "wherry_operator_reconcile_duration_seconds",
    "How long one reconciliation took.",
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30),
    registry=REGISTRY,
)
ACTIONS = Counter(
    "wherry_operator_actions",
    "Writes to the API server, by verb, kind and whether it took them.",
    ["verb", "kind", "result"],
    registry=REGISTRY,
)
QUEUE_LENGTH = Gauge("wherry_operator_queue_length", "LLMDeployments waiting to be looked at.", registry=REGISTRY)
LEADER = Gauge("wherry_operator_leader", "1 while this operator acts, 0 while it stands by.", registry=REGISTRY)
LOST_NODES = Gauge("wherry_operator_lost_nodes", "Nodes that are held for lost.", registry=REGISTRY)
ISOLATED = Gauge(
    "wherry_operator_isolated", "1 while the operator suspects that it is cut off itself.", registry=REGISTRY
)
