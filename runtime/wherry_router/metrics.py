"""The router's Prometheus metrics. Labels hold only what the router itself chooses, never what a client sends."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from wherry_protocol.naming import INTER_TOKEN_BUCKETS, TTFT_BUCKETS

# Creation times double the number of series and no dashboard reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]


class RouterMetrics:
    """Every metric of a router, in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "wherry_router_requests", "Requests by route and HTTP status.", ["route", "code"], registry=registry
        )
        self.ttft = Histogram(
            "wherry_router_time_to_first_token_seconds",
            "Request to the first token, as clients see it.",
            registry=registry,
            buckets=TTFT_BUCKETS,
        )
        self.inter_token = Histogram(
            "wherry_router_inter_token_latency_seconds",
            "Between two tokens of an answer, as clients see it.",
            registry=registry,
            buckets=INTER_TOKEN_BUCKETS,
        )
        self.in_flight = Gauge("wherry_router_requests_in_flight", "Requests being answered.", registry=registry)
        self.outstanding = Gauge(
            "wherry_router_outstanding_tokens",
            "Tokens of prompts and answers that workers owe, estimated.",
            registry=registry,
        )
        self.replicas = Gauge(
            "wherry_router_replicas", "Replicas by state: routable or suspect.", ["state"], registry=registry
        )
        self._retries = Counter(
            "wherry_router_retries", "Tries on another replica, by what failed.", ["reason"], registry=registry
        )
        self.lost = Counter(
            "wherry_router_streams_lost", "Streams that ended in an error after their first token.", registry=registry
        )
        self.disconnects = Counter(
            "wherry_router_client_disconnects", "Clients that left before their answer's end.", registry=registry
        )
        self._children: dict[tuple[str, int], Counter] = {}

    def answered(self, route: str, status: int) -> None:
        """Counts an answer."""
        counter = self._children.get((route, status))
        if counter is None:
            counter = self._children[route, status] = self._requests.labels(route, str(status))
        counter.inc()

    def retried(self, reason: str) -> None:
        """Counts a failed try that is followed by another."""
        self._retries.labels(reason).inc()
