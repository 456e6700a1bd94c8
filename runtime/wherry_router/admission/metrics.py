"""Metrics of admission. A class's name is the operator's own; of tenants a bounded number is told apart."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

WAIT_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
MAX_TENANTS = 100
OTHERS = "others"


class AdmissionMetrics:
    """Every metric of admission, in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Gauge(
            "wherry_router_queued_requests", "Requests that wait in the router, by class.", ["class"], registry=registry
        )
        self.tokens = Gauge(
            "wherry_router_queued_tokens",
            "Tokens of prompts and answers of requests that wait in the router, estimated, by class.",
            ["class"],
            registry=registry,
        )
        self.wait = Histogram(
            "wherry_router_queue_wait_seconds",
            "What requests that went to a worker had waited in the router, by class; most of them nothing.",
            ["class"],
            registry=registry,
            buckets=WAIT_BUCKETS,
        )
        self._refused = Counter(
            "wherry_router_refused",
            "Requests that admission refused, by class and reason: queue_full, shed (displaced by others), too_slow "
            "(could not begin in time), timeout (its time in the queue was over), no_replica.",
            ["class", "reason"],
            registry=registry,
        )
        self._tenants = Counter(
            "wherry_router_tenant_tokens",
            f"Tokens of prompts and answers by tenant; the first {MAX_TENANTS} are told apart.",
            ["tenant"],
            registry=registry,
        )
        self._children: dict[str, Counter] = {}

    def refused(self, class_name: str, reason: str) -> None:
        """Counts a refusal."""
        self._refused.labels(class_name, reason).inc()

    def spent(self, tenant: str, tokens: int) -> None:
        """Counts what a tenant's request took. Requests of nobody in particular are not counted here."""
        if not tenant:
            return
        child = self._children.get(tenant)
        if child is None:
            name = tenant if len(self._children) < MAX_TENANTS else OTHERS
            if name == OTHERS and OTHERS in self._children:
                child = self._children[OTHERS]
            else:
                child = self._children[name] = self._tenants.labels(name)
        child.inc(tokens)
