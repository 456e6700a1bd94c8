"""The hot path: /v1/chat/completions and /v1/completions, from a client's bytes to a client's bytes; and the door of
/v1/embeddings, which has a file of its own."""

import asyncio
import logging
import os
import time
from contextlib import aclosing, nullcontext

from wherry_protocol.http.asgi import CancelOnDisconnect, Headers, Receive, Scope, Send, header, read_body, respond
from wherry_protocol.openai.answers import Choice, Usage, cancelled, failure, whole
from wherry_protocol.openai.embeddings import EmbeddingRequest
from wherry_protocol.openai.errors import ApiError, model_not_found
from wherry_protocol.openai.requests import ChatCompletionRequest, CompletionRequest, Request, parse
from wherry_protocol.openai.stream import DONE, Chunks
from wherry_protocol.openai.translate import to_execute
from wherry_protocol.worker import End, ErrorEvent, Event, ExecuteRequest, Started, Token
from wherry_router.admission.entry import BYTES_PER_TOKEN, Admission, Place
from wherry_router.backend import Backend, Delivery
from wherry_router.caller import Caller
from wherry_router.embeddings import Embeddings
from wherry_router.identity.salt import Salts
from wherry_router.limits.limiter import Charge, Limiter
from wherry_router.merge import Merged, merge
from wherry_router.metrics import RouterMetrics
from wherry_router.response_cache.cache import HEADER, NOTHING, ResponseCache, replay
from wherry_router.settings import Limits

log = logging.getLogger("wherry.router")

Kind = type[ChatCompletionRequest] | type[CompletionRequest] | type[EmbeddingRequest]
_STREAM: Headers = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


class Answer:
    """One request being answered: what every step needs to know of it."""

    def __init__(
        self,
        request: Request,
        caller: Caller,
        correlation: str,
        headers: Headers,
        began: float,
        place: Place,
        session: str = "",
    ) -> None:
        self.chat = isinstance(request, ChatCompletionRequest)
        self.request = request
        self.caller = caller
        self.id = ("chatcmpl-" if self.chat else "cmpl-") + os.urandom(12).hex()
        self.created = int(time.time())
        self.correlation = correlation
        self.headers = headers
        self.began = began
        self.place = place
        self.session = session
        self.requests: list[ExecuteRequest] = []
        self.lookup = NOTHING
        self.usage = Usage()
        self.n = request.n or 1
        self.charge: Charge

    def count(self, index: int, end: End) -> None:
        """Adds a choice to the usage; the choices of one prompt share it."""
        self.usage.add(end, with_prompt=index % self.n == 0)
        self.place.freed()

    def saw(self, index: int, event: Event) -> None:
        """Counts what an event cost: what a client that leaves early has had. From memory nothing costs tokens."""
        if self.lookup.kept is None:
            self.charge.saw(index, event)


class Completions:
    """Answers every kind of request from one backend."""

    def __init__(
        self,
        backend: Backend,
        model: str,
        limits: Limits,
        metrics: RouterMetrics,
        salts: Salts,
        limiter: Limiter,
        admission: Admission,
        cache: ResponseCache | None = None,
    ) -> None:
        self._backend = backend
        self._admission = admission
        self._salts = salts
        self._cache = cache
        self._limiter = limiter
        self._model = model
        self._limits = limits
        self._metrics = metrics
        self._embeddings = Embeddings(backend, metrics, limiter, admission)
        self.in_flight = 0
        metrics.in_flight.set_function(lambda: self.in_flight)

    async def __call__(
        self, kind: Kind, caller: Caller, scope: Scope, receive: Receive, send: Send, correlation: str, headers: Headers
    ) -> int:
        """Answers one request; returns the HTTP status, or 499 where the client left.

        Raises:
            ApiError: nothing was sent yet.
            BodyTooLarge, BodyTimeout, ClientGone: from reading the body.
        """
        if self.in_flight >= self._limits.max_concurrent:
            raise ApiError(429, "too_many_requests", "The router is answering all it may at a time.", retry_after_s=1)
        self.in_flight += 1
        try:
            began = time.perf_counter()
            body = await read_body(scope, receive, self._limits.max_body_bytes, self._limits.body_timeout_s)
            request: Request | EmbeddingRequest = parse(kind, body)
            if request.model != self._model:
                raise model_not_found(request.model, self._model)
            if isinstance(request, EmbeddingRequest):
                return await self._embeddings(request, caller, scope, send, correlation, headers, len(body))
            place = self._place(scope, caller, request, len(body))
            session = _session(scope, request, caller)
            answer = Answer(request, caller, correlation, headers, began, place, session)
            guard = CancelOnDisconnect(scope)
            with await self._limiter.reserve(caller, request, answer.id, headers) as answer.charge:
                await self._prepare(answer, scope)
                # What is told from memory takes no place from others.
                async with guard, place if answer.lookup.kept is None else nullcontext():
                    try:
                        await (self._stream(answer, send) if request.stream else self._whole(answer, send))
                    finally:
                        place.tokens = answer.charge.tokens
            if guard.gone:
                self._metrics.disconnects.inc()
                return 499
            return 200
        finally:
            self.in_flight -= 1

    def _place(self, scope: Scope, caller: Caller, request: Request, size: int) -> Place:
        prompts = 1 if isinstance(request, ChatCompletionRequest) else len(request.prompt)
        return self._admission.place(
            scope, caller, size // BYTES_PER_TOKEN, request.limit(), prompts * (request.n or 1)
        )

    async def _prepare(self, answer: Answer, scope: Scope) -> None:
        """Makes the requests for workers, and looks whether their answers are there already."""
        salt = self._salts.of(answer.caller.tenant)
        answer.requests = to_execute(answer.request, answer.id, answer.created, salt)
        for one in answer.requests:
            one.priority = answer.place.priority
        if self._cache is not None:
            control, wish = header(scope, b"cache-control"), header(scope, HEADER)
            answer.lookup = await self._cache.look(answer.requests, control, wish)
            if result := answer.lookup.result:
                self._metrics.cache.requests.labels(result).inc()
                answer.headers = [*answer.headers, *answer.lookup.headers()]

    def _generate(self, answer: Answer, *, whole: bool) -> Merged:
        cache, lookup = self._cache, answer.lookup
        if lookup.kept is not None:
            return merge([replay(events) for events in lookup.kept])
        delivery = Delivery(whole=whole, session=answer.session)
        generations = [self._backend.generate(r, answer.correlation, delivery) for r in answer.requests]
        if cache is not None and lookup.keeps:
            pairs = zip(answer.requests, generations, strict=True)
            generations = [cache.recorded(request, events, lookup) for request, events in pairs]
        return merge(generations)

    async def _whole(self, answer: Answer, send: Send) -> None:
        request = answer.request
        logprobs = bool(request.logprobs) if answer.chat else request.logprobs is not None
        prompts = 1 if isinstance(request, ChatCompletionRequest) else len(request.prompt)
        choices = [Choice(index, chat=answer.chat, logprobs=logprobs) for index in range(prompts * answer.n)]
        async with aclosing(self._generate(answer, whole=True)) as events:
            async for index, event in events:
                answer.saw(index, event)
                if type(event) is Started:
                    choices[index].restart()
                choices[index].feed(event)
                if type(event) is End:
                    answer.count(index, event)
        body = whole(answer.id, answer.created, self._model, choices, answer.usage, chat=answer.chat)
        await respond(send, 200, body, headers=answer.headers)

    async def _stream(self, answer: Answer, send: Send) -> None:
        options = answer.request.stream_options
        include_usage = options is not None and bool(options.include_usage)
        chunks = Chunks(answer.id, answer.created, self._model, chat=answer.chat, include_usage=include_usage)
        stream = _Stream(answer, chunks, send, self._metrics)
        try:
            async with aclosing(self._generate(answer, whole=False)) as events:
                async for index, event in events:
                    answer.saw(index, event)
                    await stream.feed(index, event)
        except ApiError as error:
            if not stream.open:
                raise
            await stream.write(chunks.error(error))
        except asyncio.CancelledError:
            # Either the client left, and nobody reads this, or the drain's time is over, and somebody does.
            if stream.open:
                await send(
                    {"type": "http.response.body", "body": chunks.error(failure(cancelled())), "more_body": False}
                )
            raise
        else:
            await stream.write((chunks.usage(answer.usage) if include_usage else b"") + DONE)
        await send({"type": "http.response.body", "body": b""})


def _session(scope: Scope, request: Request, caller: Caller) -> str:
    """What the client calls its session, apart from that of another tenant; empty where it says nothing."""
    named = header(scope, b"x-session-id")
    session = named.decode("latin-1") if named else getattr(request, "prompt_cache_key", None) or request.user
    return f"{caller.tenant}\0{session}" if session else ""


class _Stream:
    """Writes events as they come. The response starts with the first token, so until then an error has its status."""

    def __init__(self, answer: Answer, chunks: Chunks, send: Send, metrics: RouterMetrics) -> None:
        self._answer = answer
        self._chunks = chunks
        self._send = send
        self._metrics = metrics
        self._last = 0.0
        self._begun: set[int] = set()
        self.open = False

    async def write(self, data: bytes) -> None:
        """One piece to the client; waits while the client is slow."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def feed(self, index: int, event: Event) -> None:
        """Passes an event on."""
        kind = type(event)
        if kind is Token:
            self._time()
            data = self._chunks.token(index, event)  # type: ignore[arg-type]
        elif kind is End:
            if event.finish_reason == "cancelled":  # type: ignore[union-attr]
                raise failure(cancelled())
            self._answer.count(index, event)  # type: ignore[arg-type]
            data = self._chunks.end(index, event)  # type: ignore[arg-type]
        elif kind is ErrorEvent:
            raise failure(event)  # type: ignore[arg-type]
        else:
            return
        if index not in self._begun:
            data = await self._begin(index) + data
        if data:
            await self.write(data)

    async def _begin(self, index: int) -> bytes:
        self._begun.add(index)
        if not self.open:
            self.open = True
            headers = [*_STREAM, *self._answer.headers]
            await self._send({"type": "http.response.start", "status": 200, "headers": headers})
        return self._chunks.first(index)

    def _time(self) -> None:
        now = time.perf_counter()
        if self._last:
            self._metrics.inter_token.observe(now - self._last)
        else:
            self._metrics.ttft.observe(now - self._answer.began)
        self._last = now
