"""The router's ASGI app: hot routes by hand, the rest through FastAPI, errors in OpenAI's shape everywhere."""

import logging
import time
from collections.abc import Callable

import msgspec
from prometheus_client import CollectorRegistry

from wherry_protocol.http.asgi import (
    BodyTimeout,
    BodyTooLarge,
    ClientGone,
    Headers,
    Message,
    Receive,
    Scope,
    Send,
    correlation_id,
    respond,
    respond_unread,
)
from wherry_protocol.http.auth import TokenGuard
from wherry_protocol.http.logs import Lines
from wherry_protocol.http.server import drained
from wherry_protocol.openai.errors import ApiError, method_not_allowed, not_found, too_large, unauthorized
from wherry_protocol.router_report import PATH as REPORT_PATH
from wherry_protocol.router_report import USAGE_PATH, ReplicaReport, RouterReport
from wherry_router.admission.entry import Admission
from wherry_router.admission.settings import QueueSettings
from wherry_router.backend import Backend
from wherry_router.completions import Completions
from wherry_router.identity.gate import Gate
from wherry_router.identity.salt import Salts
from wherry_router.limits.limiter import Limiter
from wherry_router.metrics import RouterMetrics
from wherry_router.response_cache.cache import ResponseCache
from wherry_router.settings import Limits
from wherry_router.surface import HOT_ROUTES, make_surface

log = logging.getLogger("wherry.router")

_HOT = {path.encode(): (path.removeprefix("/v1/"), kind) for path, kind in HOT_ROUTES.items()}
OPEN_PATHS = frozenset({b"/health", b"/healthz", b"/readyz", b"/metrics"})
_INTERNAL = {path.encode(): path for path in (REPORT_PATH, USAGE_PATH)}
# How long nothing must have run before a router that drains closes its connections.
_QUIET_S = 2.0


class RouterApp:
    """The OpenAI API over `backend`. `gate`: who may use it; None: everybody who can reach it. `limiter`: how much.

    `report`, for whoever has `worker_token`: what `GET /internal/replicas` tells. Without both there is no such path,
    nor `GET /internal/usage`. `admission`: who waits for the backend; None: nobody does, it has a queue of its own.
    `cache`: of answers, if any.
    """

    def __init__(
        self,
        backend: Backend,
        model: str,
        limits: Limits,
        metrics: RouterMetrics,
        registry: CollectorRegistry,
        gate: Gate | None = None,
        *,
        report: Callable[[], list[ReplicaReport]] | None = None,
        worker_token: str | None = None,
        admission: Admission | None = None,
        cache: ResponseCache | None = None,
        limiter: Limiter | None = None,
    ) -> None:
        self._backend = backend
        self._limits = limits
        self._metrics = metrics
        self._gate = gate or Gate(OPEN_PATHS)
        # A guard without a token lets everybody through, so without one there is nothing behind it.
        self._report = report if worker_token else None
        self._answered = Lines(log.name, "request")
        self._report_guard = TokenGuard(worker_token, frozenset())
        self._limiter = limiter or Limiter(registry, model)
        self._admission = admission or Admission(QueueSettings(), metrics.admission)
        self._completions = Completions(
            backend, model, limits, metrics, Salts(worker_token), self._limiter, self._admission, cache
        )
        self._surface = make_surface(model, int(time.time()), self._unready, registry)
        self._draining = False

    def _unready(self) -> str | None:
        if self._draining:
            return "the router is shutting down"
        return self._gate.unready() or self._backend.unready()

    async def drain(self, timeout_s: float, grace_s: float) -> float:
        """Says that it is not ready, goes on answering for `grace_s` (until no new client is sent here) and until the
        running answers are done, `timeout_s` at most. Returns what is left of that."""
        self._draining = True
        began = time.monotonic()
        log.info("draining", extra={"fields": {"in_flight": self._completions.in_flight}})
        # A client that keeps its connection may send its next request as soon as an answer ends. It gets that one
        # answered too, with `connection: close`; a socket closed in that moment would cost it the request.
        quiet_s = min(grace_s, _QUIET_S)
        if not await drained(lambda: self._completions.in_flight, timeout_s, grace_s, quiet_s):
            log.warning("drain timed out", extra={"fields": {"cut": self._completions.in_flight}})
        return timeout_s - (time.monotonic() - began)

    def _tell(self, scope: Scope, path: str) -> bytes:
        """What the operator asks for. The client's key opens nothing here."""
        if self._report is None:
            raise not_found(path)
        if not self._report_guard.allows(scope):
            raise unauthorized()
        if scope["method"] != "GET":
            raise method_not_allowed(scope["method"], path, "GET")
        if path == USAGE_PATH:
            return msgspec.json.encode(self._limiter.usage.report())
        queued = self._admission.queued
        return msgspec.json.encode(RouterReport(replicas=self._report(), draining=self._draining, queued=queued))

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        correlation = correlation_id(scope)
        value = correlation.encode()
        headers: Headers = [(b"x-request-id", value), (b"x-correlation-id", value)]
        if self._draining:
            # The client's next request goes to another router.
            headers.append((b"connection", b"close"))
        began = time.perf_counter()
        route, kind = _HOT.get(scope["raw_path"], ("other", None))
        error: ApiError | None = None
        try:
            if (internal := _INTERNAL.get(scope["raw_path"])) is not None:
                route, status = internal, 200
                await respond(send, status, self._tell(scope, internal), headers=headers)
                return
            caller = await self._gate.identify(scope)
            if kind is None:
                await self._surface(scope, receive, _with_headers(send, headers))
                return
            if scope["method"] != "POST":
                raise method_not_allowed(scope["method"], scope["path"], "POST")
            status = await self._completions(kind, caller, scope, receive, send, correlation, headers)
        except ClientGone:
            status = 499
        except BodyTooLarge:
            status = 413
            limit = self._limits.max_body_bytes
            await respond_unread(receive, send, status, too_large(limit).body(), limit, headers)
        except BodyTimeout:
            error = ApiError(408, "timeout", "The body did not arrive in time.")
        except ApiError as refused:
            error = refused
        if error is not None:
            status = error.status
            await respond(send, status, error.body(), headers=[*headers, *error.headers()])
        seconds = time.perf_counter() - began
        self._metrics.answered(route, status, seconds)
        self._answered(route=route, status=status, correlation_id=correlation, seconds=round(seconds, 4))


def _with_headers(send: Send, headers: Headers) -> Send:
    async def send_with(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *headers]
        await send(message)

    return send_with
