"""What the worker's HTTP server asks of an engine. `wherry_runtime.engine.async_engine.AsyncEngine` has this shape."""

from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import NamedTuple, Protocol, cast, runtime_checkable

from wherry_protocol.worker import EmbedRequest, ErrorEvent, Event, ExecuteRequest, LoadReport, PrefixChange
from wherry_runtime.scheduling.digest import Cursor

Admitted = Callable[[], Awaitable[None]]


class Rounded(NamedTuple):
    """A model that was rounded as it was loaded: where it is, and how."""

    directory: Path
    method: str
    group: int


class Engine(Protocol):
    """One engine: loads a model, then runs requests. Every method is called on the server's event loop."""

    @property
    def rounded(self) -> Rounded | None:
        """The model, once it is loaded, if it was rounded meanwhile and nobody else measures it."""

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and answer together, at most."""

    async def start(self) -> None:
        """Loads the model. Raises an error that carries `code` and `message` when it cannot."""

    def generate(self, request: ExecuteRequest, admitted: Admitted | None = None) -> AsyncIterator[Event]:
        """The events of one request; closing the iterator cancels it. Raises a `Refusal` before `admitted` is awaited:
        from then on the request stands in the queue, though its first event may take long."""

    def cancel(self, request_id: str) -> bool:
        """Ends a request. False: there is none with this id."""

    def load(self) -> LoadReport:
        """How busy it is now."""

    def prefixes_since(self, cursor: Cursor | None) -> tuple[Cursor | None, PrefixChange | None]:
        """What changed in its prefix cache since `cursor` (None: all of it; None back: nothing), and the next cursor,
        which is None where there is no prefix cache."""

    def heartbeat_age(self) -> float:
        """Seconds since the step loop last went round; it also goes round while idle."""

    def bound(self) -> bool:
        """Whether other processes' requests end with this one, so that a drain waits for these too."""

    async def close(self) -> None:
        """Ends every request and frees the model."""


@runtime_checkable
class Embeds(Protocol):
    """An engine that turns texts into vectors, as far as it goes beyond the others."""

    def embed(self, request: EmbedRequest, admitted: Admitted | None = None) -> AsyncIterator[Event]:
        """The events of one request, as `Engine.generate` gives them."""


class UnsupportedTaskError(Exception):
    """The `Refusal` of an engine that has no such task."""

    code = "unsupported_task"
    status = 400
    param = "model"
    retryable = False

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.message = message


@runtime_checkable
class Refusal(Protocol):
    """An error of the engine about one request: it never ran."""

    code: str
    status: int
    message: str
    param: str | None
    retryable: bool


def refusal(error: Exception) -> tuple[int, ErrorEvent] | None:
    """The HTTP status and body for an error that `generate` raised; None: it is a fault, not a refusal."""
    if not isinstance(error, Refusal):
        return None
    event = ErrorEvent(code=error.code, message=error.message, retryable=error.retryable, param=error.param)
    return error.status, event


def events_of(
    engine: Engine, request: ExecuteRequest | EmbedRequest, admitted: Admitted | None = None
) -> AsyncGenerator[Event, None]:
    """The engine's events as a generator, which can be closed."""
    if isinstance(request, ExecuteRequest):
        return cast("AsyncGenerator[Event, None]", engine.generate(request, admitted))
    if isinstance(engine, Embeds):
        return cast("AsyncGenerator[Event, None]", engine.embed(request, admitted))
    return _no_embeddings(request.model)


async def _no_embeddings(model: str) -> AsyncGenerator[Event, None]:
    raise UnsupportedTaskError(
        f"{model!r} generates text and embeds none; send texts to /v1/chat/completions or /v1/completions, or serve an "
        "embedding model"
    )
    yield  # a generator, like every engine's
