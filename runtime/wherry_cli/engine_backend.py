"""The router's `Backend` over an engine in the same process."""

from collections.abc import AsyncGenerator
from contextlib import aclosing

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import Event, ExecuteRequest
from wherry_runtime.server.lifecycle import MAX_HEARTBEAT_AGE_S
from wherry_runtime.server.surface import Engine, events_of, refusal


class EngineBackend:
    """One engine, no HTTP in between."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def unready(self) -> str | None:
        """The engine hangs when its step loop has not gone round for long."""
        return None if self._engine.heartbeat_age() < MAX_HEARTBEAT_AGE_S else "the engine does not answer"

    async def generate(
        self, request: ExecuteRequest, correlation_id: str, *, replayable: bool
    ) -> AsyncGenerator[Event, None]:
        """See `wherry_router.backend.Backend.generate`. There is no other replica, so nothing is ever replayed."""
        try:
            async with aclosing(events_of(self._engine, request)) as events:
                async for event in events:
                    yield event
        except Exception as error:
            known = refusal(error)
            if known is None:
                raise
            status, told = known
            after = 1 if status in (429, 503) else None
            raise ApiError(status, told.code, told.message, param=told.param, retry_after_s=after) from None
