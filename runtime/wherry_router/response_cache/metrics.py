"""Metrics of the response cache. Labels hold only what the router itself chooses."""

from prometheus_client import CollectorRegistry, Counter, Gauge


class CacheMetrics:
    """Every metric of the cache, in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.requests = Counter(
            "wherry_router_response_cache_requests",
            "Requests whose answer could be kept, by whether it was there (hit), that of a question which means the "
            "same was (semantic_hit), or it had to be computed (miss).",
            ["result"],
            registry=registry,
        )
        self.bytes = Gauge(
            "wherry_router_response_cache_bytes",
            "Memory that kept answers take, in this router, or in Redis as this router was told last.",
            registry=registry,
        )
        self.questions = Gauge(
            "wherry_router_response_cache_questions",
            "Answered questions that later ones are compared with.",
            registry=registry,
        )
        self.embeddings = Counter(
            "wherry_router_response_cache_embeddings",
            "Questions that the embedding endpoint was asked about, by result: ok, timeout or error.",
            ["result"],
            registry=registry,
        )
        self.up = Gauge(
            "wherry_router_response_cache_up",
            "1 while what the cache needs (redis, embedding) is used, 0 while it is lost and nobody waits for it.",
            ["what"],
            registry=registry,
        )
