"""Reserves for a request before it runs what it may take, and settles afterwards by what it took."""

import asyncio
import contextlib
import math
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge

from wherry_protocol.http.asgi import Headers
from wherry_protocol.openai.embeddings import EmbeddingRequest
from wherry_protocol.openai.errors import ApiError
from wherry_protocol.openai.requests import Request
from wherry_protocol.worker import EXPECTED_OUTPUT, End, Event, Started, Token
from wherry_router.caller import Caller
from wherry_router.limits.bounds import Bound, Outcome, Rules
from wherry_router.limits.estimate import Estimate, PromptScale
from wherry_router.limits.local import LocalStore
from wherry_router.limits.usage import Usage

if TYPE_CHECKING:
    from wherry_router.limits.shared import SharedStore

_WORDS = {"requests": "requests per minute", "tokens": "tokens per minute", "concurrent": "requests at a time"}


class Charge:
    """What one request may take, and has taken. A `with` block: at its end, however it ends, it is settled."""

    __slots__ = (
        "_cached",
        "_completion",
        "_estimate",
        "_limiter",
        "_n",
        "_prompt",
        "_reserved",
        "bounds",
        "id",
        "tenant",
    )

    def __init__(self, limiter: "Limiter", request_id: str, tenant: str, estimate: Estimate, n: int) -> None:
        self.id = request_id
        self.tenant = tenant
        self.bounds: Sequence[Bound] = ()
        self._limiter = limiter
        self._estimate = estimate
        self._n = n
        self._prompt: dict[int, int] = {}
        self._cached: dict[int, int] = {}
        self._completion: dict[int, int] = {}
        # Of answers that have no bound, so that what is taken on top is counted while it is taken.
        self._reserved = 0 if estimate.told else estimate.choices * EXPECTED_OUTPUT

    def saw(self, index: int, event: Event) -> None:
        """An event of the answer's choice `index`."""
        kind = type(event)
        if kind is Token:
            self._completion[index] = self._completion.get(index, 0) + len(event.ids)  # type: ignore[union-attr]
            if self._reserved and self.bounds:
                self._follow()
        elif kind is Started:
            self._started(index, event)  # type: ignore[arg-type]
        elif kind is End:
            self._completion[index] = event.completion_tokens  # type: ignore[union-attr]

    def _started(self, index: int, event: Started) -> None:
        self._completion[index] = 0
        if index % self._n == 0:  # the choices of one prompt share it
            self._prompt[index] = event.prompt_tokens
            self._cached[index] = event.cached_tokens
            if self._estimate.size and not self._estimate.choices // self._n > 1:
                self._limiter.scale.note(self._estimate.size, event.prompt_tokens - self._estimate.known)

    @property
    def tokens(self) -> int:
        """What the request has taken so far, of prompts and answers."""
        return sum(self._prompt.values()) + sum(self._completion.values())

    def _follow(self) -> None:
        if sum(self._completion.values()) > self._reserved:
            self._reserved += EXPECTED_OUTPUT
            self._limiter.add(self, EXPECTED_OUTPUT)

    def __enter__(self) -> "Charge":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        prompt, completion = sum(self._prompt.values()), sum(self._completion.values())
        self._limiter.settle(self, prompt, sum(self._cached.values()), completion)


class Limiter:
    """The limits of one router. `shared`: where several routers count together; None: each for itself in `local`."""

    def __init__(
        self,
        registry: CollectorRegistry,
        model: str,
        rules: Rules | None = None,
        local: LocalStore | None = None,
        shared: "SharedStore | None" = None,
    ) -> None:
        self.scale = PromptScale()
        self.usage = Usage(registry)
        self._model = model
        self._rules = rules or Rules()
        self._local = local or LocalStore()
        self._shared = shared
        self._refusals = Counter(
            "wherry_router_limit_refusals",
            "Requests over a limit, by whose limit (key, tenant, model) and what of (requests, tokens, concurrent).",
            ["scope", "what"],
            registry=registry,
        )
        self._redis = Gauge(
            "wherry_router_redis_up",
            "1 while limits are counted in Redis, 0 while it is lost; -1 where there is none.",
            registry=registry,
        )
        self._redis.set_function(lambda: -1.0 if shared is None else float(not shared.lost))

    async def reserve(
        self, caller: Caller, request: Request | EmbeddingRequest, request_id: str, headers: Headers
    ) -> Charge:
        """Room for `request`; `headers` get where the caller's limits stand, whether there is room or not.

        Raises:
            ApiError: 429, there is no room now, with `Retry-After`; 400, there never will be; 503, it cannot be known.
        """
        estimate = Estimate(request)
        charge = Charge(
            self, request_id, caller.tenant, estimate, 1 if isinstance(request, EmbeddingRequest) else request.n or 1
        )
        bounds = self._rules.bounds(caller, self._model)
        if not bounds:
            return charge
        for bound in bounds:
            _check_size(bound, estimate)
        tokens = estimate.tokens(self.scale)
        if self._shared is None:
            outcome = self._local.reserve(request_id, bounds, tokens)
        else:
            outcome = await self._shared.reserve(request_id, bounds, tokens)
        headers += _headers(bounds, outcome)
        if outcome.refused >= 0:
            bound = bounds[outcome.refused]
            self._refusals.labels(bound.scope, outcome.what).inc()
            raise _refusal(bound, outcome)
        charge.bounds = bounds
        return charge

    def add(self, charge: Charge, tokens: int) -> None:
        """A request goes on beyond what was reserved."""
        (self._shared or self._local).add(charge.id, tokens)

    def settle(self, charge: Charge, prompt: int, cached: int, completion: int) -> None:
        """A request is over."""
        if charge.bounds:
            (self._shared or self._local).settle(charge.id, prompt + completion)
        self.usage.add(charge.tenant, prompt, cached, completion)

    def followers(self) -> list[Coroutine[None, None, None]]:
        """What has to run beside the requests. None of it ends."""
        return [] if self._shared is None else [self._shared.run()]

    async def close(self) -> None:
        """Lets what is on its way to Redis arrive."""
        if self._shared is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self._shared.close()


def _check_size(bound: Bound, estimate: Estimate) -> None:
    limit = bound.limits.tokens_per_minute
    if limit and estimate.asked > limit:
        raise ApiError(
            400,
            "request_over_limit",
            f"The request asks for up to {estimate.asked} tokens; the limit of {bound.scope} `{bound.name}` is {limit} "
            "tokens per minute. Ask for fewer.",
            param="max_tokens",
        )


def _refusal(bound: Bound, outcome: Outcome) -> ApiError:
    limits = bound.limits
    limit = {
        "requests": limits.requests_per_minute,
        "tokens": limits.tokens_per_minute,
        "concurrent": limits.concurrent,
    }[outcome.what]
    whose = f"Over the limit of {bound.scope} `{bound.name}`"
    message = f"{whose}: {limit} {_WORDS[outcome.what]}. Try again in {outcome.wait_s} s."
    return ApiError(429, "rate_limit_exceeded", message, retry_after_s=outcome.wait_s)


def _headers(bounds: Sequence[Bound], outcome: Outcome) -> Headers:
    """`x-ratelimit-*`, of the limit that has the least left."""
    requests: list[tuple[int, int, int]] = []
    tokens: list[tuple[int, int, int]] = []
    for bound, standing in zip(bounds, outcome.standings, strict=False):
        if limit := bound.limits.requests_per_minute:
            requests.append((max(limit - standing.requests, 0), limit, standing.requests_reset_s))
        if limit := bound.limits.tokens_per_minute:
            tokens.append((max(limit - standing.tokens, 0), limit, standing.tokens_reset_s))
    found: Headers = []
    for name, left in ((b"requests", requests), (b"tokens", tokens)):
        if left:
            remaining, limit, reset_s = min(left)
            found += [
                (b"x-ratelimit-limit-" + name, b"%d" % limit),
                (b"x-ratelimit-remaining-" + name, b"%d" % remaining),
                (b"x-ratelimit-reset-" + name, _duration(reset_s)),
            ]
    return found


def _duration(seconds: float) -> bytes:
    """As OpenAI writes it: 1m30s."""
    minutes, rest = divmod(math.ceil(seconds), 60)
    return b"%dm%ds" % (minutes, rest) if minutes else b"%ds" % rest
