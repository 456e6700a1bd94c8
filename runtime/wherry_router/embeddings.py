"""/v1/embeddings, from a client's request to the whole answer."""

from contextlib import aclosing

from wherry_protocol.http.asgi import CancelOnDisconnect, Headers, Scope, Send, header, respond
from wherry_protocol.openai.answers import cancelled, failure
from wherry_protocol.openai.embeddings import EmbeddingRequest, encoded, new_id, to_embed, whole
from wherry_protocol.worker import Embedding, EmbedRequest, End, ErrorEvent, Started
from wherry_router.admission.entry import BYTES_PER_TOKEN, Admission
from wherry_router.backend import Backend, Delivery
from wherry_router.caller import Caller
from wherry_router.limits.limiter import Charge, Limiter
from wherry_router.metrics import RouterMetrics


class Embeddings:
    """Answers requests for vectors from one backend."""

    def __init__(self, backend: Backend, metrics: RouterMetrics, limiter: Limiter, admission: Admission) -> None:
        self._backend = backend
        self._metrics = metrics
        self._limiter = limiter
        self._admission = admission

    async def __call__(
        self,
        request: EmbeddingRequest,
        caller: Caller,
        scope: Scope,
        send: Send,
        correlation: str,
        headers: Headers,
        size: int,
    ) -> int:
        """Answers one request; returns the HTTP status, or 499 where the client left.

        Args:
            size: of its body, in bytes.

        Raises:
            ApiError: nothing was sent yet.
        """
        place = self._admission.place(scope, caller, size // BYTES_PER_TOKEN, 1, 1)
        work = to_embed(request, new_id())
        work.priority = place.priority
        named = header(scope, b"x-session-id")
        session = named.decode("latin-1") if named else request.user
        delivery = Delivery(whole=True, session=f"{caller.tenant}\0{session}" if session else "")
        guard = CancelOnDisconnect(scope)
        with await self._limiter.reserve(caller, request, work.id, headers) as charge:
            async with guard, place:
                try:
                    body = await self._answer(request, work, correlation, delivery, charge)
                    await respond(send, 200, body, headers=headers)
                finally:
                    place.tokens = charge.tokens
        if guard.gone:
            self._metrics.disconnects.inc()
            return 499
        return 200

    async def _answer(
        self, request: EmbeddingRequest, work: EmbedRequest, correlation: str, delivery: Delivery, charge: Charge
    ) -> bytes:
        members: list[bytes] = []
        tokens = 0
        async with aclosing(self._backend.generate(work, correlation, delivery)) as events:
            async for event in events:
                charge.saw(0, event)
                if type(event) is Embedding:
                    members.append(encoded(event.index, event.vector, request.encoding_format))
                elif type(event) is Started:
                    # Another worker may begin anew.
                    members, tokens = [], event.prompt_tokens
                elif type(event) is ErrorEvent:
                    raise failure(event)
                elif type(event) is End and event.finish_reason == "cancelled":
                    raise failure(cancelled())
        return whole(request.model, members, tokens)
