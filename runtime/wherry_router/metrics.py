"""The router's Prometheus metrics. Labels hold only what the router itself chooses, never what a client sends."""

import functools
from collections import Counter as Tally
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics

from wherry_protocol.naming import INTER_TOKEN_BUCKETS, TTFT_BUCKETS
from wherry_router.admission.metrics import AdmissionMetrics
from wherry_router.response_cache.metrics import CacheMetrics

if TYPE_CHECKING:
    from wherry_router.pool import Pool

DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 300, 600)
RESUME_GAP_BUCKETS = (0.05, 0.1, 0.2, 0.35, 0.5, 0.75, 1, 1.5, 2, 3, 5, 10, 30, 60, 120)

# Creation times double the number of series and no dashboard reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]


class RouterMetrics:
    """Every metric of a router, in `registry`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._requests = Counter(
            "wherry_router_requests", "Requests by route and HTTP status.", ["route", "code"], registry=registry
        )
        self._durations = Histogram(
            "wherry_router_request_duration_seconds",
            "Requests that were answered (200), from their headers to the last byte, by route.",
            ["route"],
            registry=registry,
            buckets=DURATION_BUCKETS,
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
            "wherry_router_replicas",
            "Replicas by state: routable, draining or suspect (breaker not closed, or ejected).",
            ["state"],
            registry=registry,
        )
        self._add_resilience(registry)
        self._add_policy(registry)
        self._retries = Counter(
            "wherry_router_retries", "Tries on another replica, by what failed.", ["reason"], registry=registry
        )
        self.lost = Counter(
            "wherry_router_streams_lost", "Streams that ended in an error after their first token.", registry=registry
        )
        self._resumes = Counter(
            "wherry_router_streams_resumed",
            "Answers that went on with another try after their first token, by what had failed.",
            ["reason"],
            registry=registry,
        )
        self.resume_gap = Histogram(
            "wherry_router_resume_gap_seconds",
            "From the last sign of life of a worker that was lost to its answer's next token.",
            registry=registry,
            buckets=RESUME_GAP_BUCKETS,
        )
        self.disconnects = Counter(
            "wherry_router_client_disconnects", "Clients that left before their answer's end.", registry=registry
        )
        self._add_following(registry)

    def _add_following(self, registry: CollectorRegistry) -> None:
        self._stale = Gauge(
            "wherry_router_stale",
            "1 while what is followed (API keys, an issuer, a certificate) cannot be used as it is now, and the last "
            "good one stays in use.",
            ["what"],
            registry=registry,
        )
        self.admission = AdmissionMetrics(registry)
        self.cache = CacheMetrics(registry)
        self._children: dict[tuple[str, int], Counter] = {}
        self._timed: dict[str, Histogram] = {}
        self.tls_not_after = Gauge(
            "wherry_router_tls_not_after_seconds",
            "Unix time at which the listener's certificate ends; 0 without TLS.",
            registry=registry,
        )
        self.worker_tls_not_after = Gauge(
            "wherry_router_worker_tls_not_after_seconds",
            "Unix time at which the certificate that workers see ends; 0 without mutual TLS.",
            registry=registry,
        )

    def _add_resilience(self, registry: CollectorRegistry) -> None:
        self._breakers = Gauge(
            "wherry_router_breakers", "Circuit breakers by state, one a replica.", ["state"], registry=registry
        )
        self._openings = Counter(
            "wherry_router_breaker_openings", "Breakers that opened, by the fault.", ["reason"], registry=registry
        )
        self._ejections = Counter(
            "wherry_router_ejections", "Replicas left out for a while, by cause.", ["cause"], registry=registry
        )
        self._panic = Gauge(
            "wherry_router_panic", "1 while so many replicas look bad that all of them are used.", registry=registry
        )
        self.panics = Counter("wherry_router_panics", "Times that panic mode began.", registry=registry)
        self.retries_denied = Counter(
            "wherry_router_retries_denied", "Retries that the budget did not allow.", registry=registry
        )
        self.bulkhead_refusals = Counter(
            "wherry_router_bulkhead_refusals",
            "Requests refused since every replica had its bound of requests from this router.",
            registry=registry,
        )

    def _add_policy(self, registry: CollectorRegistry) -> None:
        self._decisions = Counter(
            "wherry_router_policy_decisions",
            "Replicas chosen, by why: for their prefix or session, by load or turn, by hash (cold), or since the best "
            "one had too much (hot).",
            ["reason"],
            registry=registry,
        )
        self._decided: dict[str, Counter] = {}
        self._prompt_tokens = Counter(
            "wherry_router_prompt_tokens", "Tokens of prompts that workers began with.", registry=registry
        )
        self._cached_tokens = Counter(
            "wherry_router_cached_prompt_tokens", "Of these, those that the worker had cached.", registry=registry
        )
        self._known_prefixes = Gauge(
            "wherry_router_known_prefixes", "Prefixes that replicas have told they have cached.", registry=registry
        )
        self._reporting = Gauge(
            "wherry_router_replicas_reporting", "Replicas that push load reports now.", registry=registry
        )
        self._imbalance = Gauge(
            "wherry_router_load_max_over_mean",
            "Tokens that the replica owes which owes the most, over the mean of all; 0 while nothing is owed.",
            registry=registry,
        )

    def watch_pool(self, pool: "Pool") -> None:
        """Reads the gauges of replicas from `pool` at each scrape."""
        self.outstanding.set_function(lambda: sum(r.outstanding_tokens for r in pool.replicas()))
        for state in ("routable", "draining", "suspect"):
            self.replicas.labels(state).set_function(functools.partial(_count, pool.states, state))
        for state in ("closed", "open", "half_open"):
            self._breakers.labels(state).set_function(functools.partial(_count, pool.breaker_states, state))
        self._panic.set_function(lambda: pool.panicking(pool.clock()))
        self._known_prefixes.set_function(lambda: sum(len(r.prefixes) for r in pool.replicas()))
        self._reporting.set_function(lambda: sum(r.load is not None for r in pool.replicas()))
        self._imbalance.set_function(lambda: _max_over_mean([r.load_tokens for r in pool.replicas()]))

    def watch_stale(self, stale: Callable[[], dict[str, bool]]) -> None:
        """Reads at each scrape what of `stale` is so; its names do not change."""
        for what in stale():
            self._stale.labels(what).set_function(functools.partial(_is, stale, what))

    def answered(self, route: str, status: int, seconds: float) -> None:
        """Counts an answer, and how long it took."""
        if status == 200:
            if (duration := self._timed.get(route)) is None:
                duration = self._timed[route] = self._durations.labels(route)
            duration.observe(seconds)
        counter = self._children.get((route, status))
        if counter is None:
            counter = self._children[route, status] = self._requests.labels(route, str(status))
        counter.inc()

    def decided(self, reason: str) -> None:
        """Counts a choice of a replica."""
        counter = self._decided.get(reason)
        if counter is None:
            counter = self._decided[reason] = self._decisions.labels(reason)
        counter.inc()

    def read_prompt(self, tokens: int, cached: int) -> None:
        """Counts the prompt of a request that a worker began with."""
        self._prompt_tokens.inc(tokens)
        self._cached_tokens.inc(cached)

    def breaker_opened(self, reason: str) -> None:
        """Counts a breaker that opened."""
        self._openings.labels(reason).inc()

    def ejected(self, cause: str) -> None:
        """Counts an ejection."""
        self._ejections.labels(cause).inc()

    def resumed(self, reason: str) -> None:
        """Counts a try that goes on with an answer."""
        self._resumes.labels(reason).inc()

    def retried(self, reason: str) -> None:
        """Counts a failed try that is followed by another."""
        self._retries.labels(reason).inc()


def _is(flags: Callable[[], dict[str, bool]], name: str) -> float:
    return float(flags()[name])


def _max_over_mean(loads: Collection[int]) -> float:
    total = sum(loads)
    return max(loads) * len(loads) / total if total else 0.0


def _count(states: Callable[[], Collection[str]], state: str) -> int:
    return Tally(states())[state]
