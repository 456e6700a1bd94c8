"""The worker API of wherry_protocol.worker as an ASGI app: https://asgi.readthedocs.io/en/latest/specs/www.html."""

import logging
import time
from collections.abc import Awaitable, Callable
from contextlib import aclosing

import msgspec
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_1_0_0

from wherry_protocol.http.asgi import (
    BodyTimeout,
    BodyTooLarge,
    CancelOnDisconnect,
    ClientGone,
    Headers,
    Receive,
    Scope,
    Send,
    correlation_id,
    read_body,
    respond,
    respond_unread,
)
from wherry_protocol.http.auth import TokenGuard
from wherry_protocol.http.mutual_tls import MutualTls
from wherry_protocol.sse import HEADER_HEARTBEAT, HEARTBEAT_S, encode_event
from wherry_protocol.worker import CancelRequest, EmbedRequest, End, ErrorEvent, Event, ExecuteRequest, Metrics, Token
from wherry_runtime.server.lifecycle import Lifecycle
from wherry_runtime.server.load_watch import watch_load
from wherry_runtime.server.metrics import WorkerMetrics
from wherry_runtime.server.pulse import Pulse
from wherry_runtime.server.surface import Engine, events_of, refusal

log = logging.getLogger("wherry.worker")

MAX_BODY_BYTES = 16 * 1024 * 1024
_OPEN = frozenset({b"/health", b"/ready", b"/metrics"})
_SSE: Headers = [
    (b"content-type", b"text/event-stream"),
    (b"cache-control", b"no-store"),
    (HEADER_HEARTBEAT.encode(), str(HEARTBEAT_S).encode()),
]
_encode = msgspec.json.Encoder().encode
_decode_execute = msgspec.json.Decoder(ExecuteRequest).decode
_decode_embed = msgspec.json.Decoder(EmbedRequest).decode
_decode_cancel = msgspec.json.Decoder(CancelRequest).decode


Work = ExecuteRequest | EmbedRequest


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str, *, retryable: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.event = ErrorEvent(code=code, message=message, retryable=retryable)


class _Call:
    """One HTTP request on its way."""

    __slots__ = ("began", "correlation", "headers", "receive", "scope", "send")

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self.scope, self.receive, self.send = scope, receive, send
        self.correlation = correlation_id(scope)
        self.headers: Headers = [(b"x-correlation-id", self.correlation.encode())]
        self.began = time.perf_counter()

    async def json(self, status: int, value: object) -> None:
        """A whole JSON answer. 429 and 503 say when to try again."""
        extra: Headers = [(b"retry-after", b"1")] if status in (429, 503) else []
        await respond(self.send, status, _encode(value), headers=[*self.headers, *extra])


class WorkerApp:
    """Routes by the raw path's bytes, after the token was checked against those same bytes."""

    def __init__(
        self, engine: Engine, model: str, token: str | None, lifecycle: Lifecycle, tls: MutualTls | None = None
    ) -> None:
        self._engine = engine
        self._model = model
        self._guard = TokenGuard(token, _OPEN)
        self._lifecycle = lifecycle
        self._registry = CollectorRegistry()
        self._metrics = WorkerMetrics(
            self._registry, model, lambda: engine.load() if lifecycle.state in ("ready", "draining") else None
        )
        self._metrics.watch_download(lifecycle.download)
        if tls is not None:
            self._metrics.watch_tls(tls)
        self._routes: dict[bytes, tuple[str, Callable[[_Call], Awaitable[None]]]] = {
            b"/execute": ("POST", self._execute),
            b"/embed": ("POST", self._embed),
            b"/cancel": ("POST", self._cancel),
            b"/shutdown": ("POST", self._shutdown),
            b"/load": ("GET", self._load),
            b"/load/watch": ("GET", self._watch_load),
            b"/health": ("GET", self._health),
            b"/ready": ("GET", self._ready),
            b"/metrics": ("GET", self._scrape),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        call = _Call(scope, receive, send)
        try:
            await self._handler(scope)(call)
        except _Refused as refused:
            self._metrics.refused(refused.status)
            await call.json(refused.status, refused.event)
        except BodyTooLarge:
            error = ErrorEvent(code="request_too_large", message=f"the body is over {MAX_BODY_BYTES} bytes")
            await respond_unread(receive, send, 413, _encode(error), MAX_BODY_BYTES, call.headers)
        except BodyTimeout:
            await call.json(408, ErrorEvent(code="timeout", message="the body did not arrive in time", retryable=True))
        except ClientGone:
            pass

    def _handler(self, scope: Scope) -> Callable[[_Call], Awaitable[None]]:
        if not self._guard.allows(scope):
            raise _Refused(401, "unauthorized", "the worker token is missing or wrong")
        method, handler = self._routes.get(scope["raw_path"], ("", None))
        if handler is None:
            raise _Refused(404, "not_found", "the worker API has no such path")
        if scope["method"] != method:
            raise _Refused(405, "method_not_allowed", f"use {method}")
        return handler

    async def _execute(self, call: _Call) -> None:
        await self._run(call, _decode_execute)

    async def _embed(self, call: _Call) -> None:
        await self._run(call, _decode_embed)

    async def _run(self, call: _Call, decode: Callable[[bytes], Work]) -> None:
        body = await read_body(call.scope, call.receive, MAX_BODY_BYTES)
        try:
            request = decode(body)
        except msgspec.DecodeError as error:
            raise _Refused(400, "invalid_request", str(error)) from None
        if self._lifecycle.state != "ready":
            raise _Refused(503, self._lifecycle.state, self._lifecycle.message or "not ready", retryable=True)
        if request.model != self._model:
            raise _Refused(404, "model_not_found", f"this worker serves {self._model!r}")
        with self._lifecycle.running():
            guard = CancelOnDisconnect(call.scope)
            async with guard:
                await self._stream(call, request)
        if guard.gone:
            log.info("client gone, cancelled", extra={"fields": self._fields(call, request)})

    async def _stream(self, call: _Call, request: Work) -> None:
        pulse = Pulse(call.send)
        last = call.began

        async def begin() -> None:
            # Not only with the first token: who waits for it learns that the connection carries anything at all.
            await pulse.send({"type": "http.response.start", "status": 200, "headers": [*_SSE, *call.headers]})

        async with aclosing(events_of(self._engine, request, begin)) as events:
            try:
                async for event in events:
                    if type(event) is Token:
                        now = time.perf_counter()
                        (self._metrics.ttft if last is call.began else self._metrics.inter_token).observe(now - last)
                        last = now
                    else:
                        self._note(call, request, event)
                    await pulse.send({"type": "http.response.body", "body": encode_event(event), "more_body": True})
            except Exception as error:
                if not pulse.begun:
                    await self._refuse(call, request, error)
                    return
                await self._break_off(call, request, error)
            finally:
                pulse.stop()
        await call.send({"type": "http.response.body", "body": b""})

    async def _refuse(self, call: _Call, request: Work, error: Exception) -> None:
        known = refusal(error)
        if known is None:
            log.error("request failed", exc_info=error, extra={"fields": self._fields(call, request)})
            known = 500, ErrorEvent(code="internal_error", message="the engine failed on this request")
        status, event = known
        fields = self._fields(call, request) | {"status": status, "code": event.code}
        log.info("refused", extra={"fields": fields})
        self._metrics.refused(status)
        await call.json(status, event)

    async def _break_off(self, call: _Call, request: Work, error: Exception) -> None:
        log.error("answer broke off", exc_info=error, extra={"fields": self._fields(call, request)})
        event = ErrorEvent(code="internal_error", message="the engine failed during this answer", retryable=True)
        await call.send({"type": "http.response.body", "body": encode_event(event), "more_body": True})

    def _note(self, call: _Call, request: Work, event: Event) -> None:
        if type(event) is Metrics:
            self._metrics.queue.observe(event.queue_s)
        elif type(event) is End:
            seconds = time.perf_counter() - call.began
            self._metrics.e2e.observe(seconds)
            self._metrics.ended(event.finish_reason)
            fields = self._fields(call, request) | {
                "finish_reason": event.finish_reason,
                "prompt_tokens": event.prompt_tokens,
                "completion_tokens": event.completion_tokens,
                "seconds": round(seconds, 4),
            }
            log.info("answered", extra={"fields": fields})
        elif type(event) is ErrorEvent:
            log.warning("answer failed", extra={"fields": self._fields(call, request) | {"code": event.code}})

    @staticmethod
    def _fields(call: _Call, request: Work) -> dict[str, object]:
        return {"correlation_id": call.correlation, "request_id": request.id[:200]}

    async def _cancel(self, call: _Call) -> None:
        body = await read_body(call.scope, call.receive, 64 * 1024)
        try:
            request = _decode_cancel(body)
        except msgspec.DecodeError as error:
            raise _Refused(400, "invalid_request", str(error)) from None
        await call.json(200, {"cancelled": self._engine.cancel(request.id)})

    async def _shutdown(self, call: _Call) -> None:
        self._lifecycle.stop.set()
        await call.json(202, {"state": "draining"})

    async def _load(self, call: _Call) -> None:
        if self._lifecycle.state not in ("ready", "draining"):
            raise _Refused(503, self._lifecycle.state, "the model is not loaded", retryable=True)
        await call.json(200, self._engine.load())

    async def _watch_load(self, call: _Call) -> None:
        if self._lifecycle.state != "ready":
            raise _Refused(503, self._lifecycle.state, self._lifecycle.message or "not ready", retryable=True)
        async with CancelOnDisconnect(call.scope):
            await call.send({"type": "http.response.start", "status": 200, "headers": [*_SSE, *call.headers]})
            await watch_load(self._engine, lambda: self._lifecycle.state == "ready", call.send)

    async def _health(self, call: _Call) -> None:
        status, report = self._lifecycle.health(self._engine)
        await call.json(status, report)

    async def _ready(self, call: _Call) -> None:
        status, report = self._lifecycle.ready()
        await call.json(status, report)

    async def _scrape(self, call: _Call) -> None:
        content_type = CONTENT_TYPE_PLAIN_1_0_0.encode()
        await respond(call.send, 200, generate_latest(self._registry), content_type=content_type, headers=call.headers)
