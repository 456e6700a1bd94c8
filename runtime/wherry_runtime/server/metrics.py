"""The worker's Prometheus metrics: the meanings of vLLM's, which dashboards know, under the prefix `wherry_`.

Gauges and token counters are read from the engine when Prometheus scrapes; only latencies are observed per request.
"""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from wherry_protocol.http.mutual_tls import MutualTls
from wherry_protocol.naming import INTER_TOKEN_BUCKETS, TTFT_BUCKETS
from wherry_protocol.worker import LoadReport
from wherry_runtime.sources.progress import Download

# Creation times double the number of series and no dashboard reads them.
disable_created_metrics()  # type: ignore[no-untyped-call]

LABEL = "model_name"

E2E_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)

_FROM_LOAD: tuple[tuple[type[Metric], str, str, Callable[[LoadReport], float]], ...] = (
    (GaugeMetricFamily, "num_requests_running", "Requests in the running batch.", lambda load: load.running),
    (GaugeMetricFamily, "num_requests_waiting", "Requests in the queue.", lambda load: load.waiting),
    (GaugeMetricFamily, "num_requests_max", "Requests that fit into the batch.", lambda load: load.max_running),
    (
        GaugeMetricFamily,
        "kv_cache_usage_perc",
        "Share of the KV cache in use, 0 to 1.",
        lambda load: load.kv_tokens_used / max(load.kv_tokens_total, 1),
    ),
    (GaugeMetricFamily, "kv_cache_tokens", "Tokens that fit into the KV cache.", lambda load: load.kv_tokens_total),
    (GaugeMetricFamily, "engine_ready", "1 when the model is loaded and requests are taken.", lambda load: load.ready),
    (
        GaugeMetricFamily,
        "engine_heartbeat_age_seconds",
        "Seconds since the step loop last went round.",
        lambda load: load.heartbeat_age_s,
    ),
    (CounterMetricFamily, "prompt_tokens", "Prompt tokens processed.", lambda load: load.prompt_tokens_total),
    (CounterMetricFamily, "generation_tokens", "Tokens generated.", lambda load: load.completion_tokens_total),
    (
        CounterMetricFamily,
        "prefix_cache_queries",
        "Prompt tokens looked up in the prefix cache; hits over queries is its hit rate.",
        lambda load: load.prefix_queried_tokens_total,
    ),
    (
        CounterMetricFamily,
        "prefix_cache_hits",
        "Prompt tokens found in the prefix cache.",
        lambda load: load.prefix_hit_tokens_total,
    ),
    (CounterMetricFamily, "num_preemptions", "Requests put back into the queue.", lambda load: load.preemptions_total),
    (
        CounterMetricFamily,
        "spec_decode_num_draft_tokens",
        "Tokens that speculative decoding guessed and the model checked.",
        lambda load: load.draft_tokens_total,
    ),
    (
        CounterMetricFamily,
        "spec_decode_num_accepted_tokens",
        "Guessed tokens that held; over guessed ones it is the acceptance rate.",
        lambda load: load.accepted_tokens_total,
    ),
    (CounterMetricFamily, "engine_steps", "Steps of the engine.", lambda load: load.steps_total),
)


class LoadCollector(Collector):
    """Gauges and token counters, read from the engine on each scrape."""

    def __init__(self, model: str, load: Callable[[], LoadReport | None]) -> None:
        self._model = model
        self._load = load

    def describe(self) -> Iterator[Metric]:
        for family, name, text, _ in _FROM_LOAD:
            yield family("wherry_" + name, text, labels=[LABEL])  # type: ignore[call-arg]

    def collect(self) -> Iterator[Metric]:
        load = self._load()
        if load is None:
            return
        for metric, (_, _, _, read) in zip(self.describe(), _FROM_LOAD, strict=True):
            metric.add_metric([self._model], float(read(load)))  # type: ignore[attr-defined]
            yield metric


class WorkerMetrics:
    """Every metric of a worker, in `registry`. `load` is called on each scrape; None while there is no engine."""

    def __init__(self, registry: CollectorRegistry, model: str, load: Callable[[], LoadReport | None]) -> None:
        registry.register(LoadCollector(model, load))
        label = [LABEL]

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, label, registry=registry, buckets=buckets).labels(model)

        self.ttft = histogram("wherry_time_to_first_token_seconds", "Arrival to the first token.", TTFT_BUCKETS)
        self.inter_token = histogram(
            "wherry_inter_token_latency_seconds", "Between two tokens of an answer.", INTER_TOKEN_BUCKETS
        )
        self.e2e = histogram("wherry_e2e_request_latency_seconds", "Arrival to the last token.", E2E_BUCKETS)
        self.queue = histogram("wherry_request_queue_time_seconds", "Time in the queue.", E2E_BUCKETS)
        self._success = Counter(
            "wherry_request_success", "Answers that ended.", [*label, "finished_reason"], registry=registry
        )
        self._refused = Counter("wherry_request_refused", "Requests refused.", [*label, "code"], registry=registry)
        self._tls_not_after = Gauge(
            "wherry_worker_tls_not_after_seconds",
            "Unix time at which the certificate that routers see ends; 0 without TLS.",
            registry=registry,
        )
        self._tls_stale = Gauge(
            "wherry_worker_tls_stale",
            "1 while the certificate cannot be used as it is now, and the last good one stays in use.",
            registry=registry,
        )
        self._download_bytes = Gauge(
            "wherry_model_download_bytes",
            "Bytes of the model that are here; 0 before a download.",
            label,
            registry=registry,
        ).labels(model)
        self._download_total = Gauge(
            "wherry_model_download_total_bytes",
            "Bytes of the model; 0 where nothing is downloaded.",
            label,
            registry=registry,
        ).labels(model)
        self._model = model

    def watch_download(self, download: Download) -> None:
        """Reads at each scrape how far `download` is."""
        self._download_bytes.set_function(lambda: download.snapshot().done)
        self._download_total.set_function(lambda: download.snapshot().total)

    def watch_tls(self, tls: MutualTls) -> None:
        """Reads at each scrape how `tls` is."""
        self._tls_not_after.set_function(lambda: tls.not_after)
        self._tls_stale.set_function(lambda: tls.stale)

    def ended(self, reason: str) -> None:
        """Counts an answer by why it ended."""
        self._success.labels(self._model, reason).inc()

    def refused(self, status: int) -> None:
        """Counts a refusal by its HTTP status."""
        self._refused.labels(self._model, str(status)).inc()
