"""Metrics of admission. A class's name is the operator's own."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

WAIT_BUCKETS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


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

    def refused(self, class_name: str, reason: str) -> None:
        """Counts a refusal."""
        self._refused.labels(class_name, reason).inc()
