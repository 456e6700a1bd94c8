"""What each tenant has used since the router started."""

import time

from prometheus_client import CollectorRegistry, Counter

from wherry_protocol.router_report import TenantUsage, UsageReport

# Tenants may be as many as an issuer has users. Those above these bounds are counted together.
MAX_LABELS = 200
MAX_TENANTS = 10_000
OTHER = "(other)"  # no tenant can be called so
KINDS = ("prompt", "cached", "completion")


class Usage:
    """Counters by tenant. `cached` prompt tokens are part of `prompt`."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._since = time.time()
        self._tenants: dict[str, TenantUsage] = {}
        self._labelled: dict[str, list[Counter]] = {}
        self._tokens = Counter(
            "wherry_router_tenant_tokens",
            "Tokens by tenant: prompt, cached (those of prompt that were in the cache) and completion.",
            ["tenant", "kind"],
            registry=registry,
        )

    def add(self, tenant: str, prompt: int, cached: int, completion: int) -> None:
        """A request ended, however it did."""
        name = tenant if tenant in self._tenants or len(self._tenants) < MAX_TENANTS else OTHER
        found = self._tenants.get(name)
        if found is None:
            found = self._tenants[name] = TenantUsage(tenant=name)
        found.requests += 1
        found.prompt_tokens += prompt
        found.cached_tokens += cached
        found.completion_tokens += completion
        for counter, count in zip(self._counters(tenant), (prompt, cached, completion), strict=True):
            if count:
                counter.inc(count)

    def report(self) -> UsageReport:
        """All of it."""
        return UsageReport(since=self._since, tenants=list(self._tenants.values()))

    def _counters(self, tenant: str) -> list[Counter]:
        label = tenant if tenant in self._labelled or len(self._labelled) < MAX_LABELS else OTHER
        found = self._labelled.get(label)
        if found is None:
            found = self._labelled[label] = [self._tokens.labels(label, kind) for kind in KINDS]
        return found
