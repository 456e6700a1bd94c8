"""The router's `Backend` over an engine in the same process."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import ErrorEvent, Event
from wherry_router.backend import Delivery, Work
from wherry_router.fault import WorkerFault
from wherry_router.ledger import books_of
from wherry_router.settings import Limits
from wherry_runtime.server.lifecycle import MAX_HEARTBEAT_AGE_S
from wherry_runtime.server.surface import Engine, events_of, refusal


class EngineBackend:
    """One engine, no HTTP in between."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._max_tries = Limits().max_resume_tries

    def unready(self) -> str | None:
        """The engine hangs when its step loop has not gone round for long."""
        return None if self._engine.heartbeat_age() < MAX_HEARTBEAT_AGE_S else "the engine does not answer"

    async def generate(self, request: Work, correlation_id: str, delivery: Delivery) -> AsyncGenerator[Event, None]:
        """See `wherry_router.backend.Backend.generate`. An engine that failed and is there again goes on with the
        answer; one that shuts down does not."""
        ledger = books_of(request)
        failed = fruitless = tokens = 0
        while True:
            try:
                async with aclosing(events_of(self._engine, ledger.request(failed))) as events:
                    async for event in events:
                        told = ledger.take(event)
                        if told is not None:
                            yield told
                return  # noqa: TRY300 - in a loop
            except WorkerFault as fault:
                failed += 1
                fruitless, tokens = (0 if len(ledger.ids) > tokens else fruitless + 1), len(ledger.ids)
                last = fault
            except Exception as error:
                known = refusal(error)
                if known is None:
                    raise
                status, told = known
                after = 1 if status in (429, 503) else None
                raise ApiError(status, told.code, told.message, param=told.param, retry_after_s=after) from None
            if last.reason == "shutting_down" or fruitless >= self._max_tries:
                yield last.event or ErrorEvent(code="resume_failed", message=str(last), retryable=True)
                return
