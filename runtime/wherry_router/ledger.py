"""What a client has been given of one generation, and what another worker needs to go on with it.

Every event passes here on its way to the client. What does not follow on what was passed on before (a token left out,
or told twice) is the worker's fault, and never gets through.
"""

from typing import Protocol

import msgspec

from wherry_protocol.worker import (
    Embedding,
    EmbedRequest,
    End,
    ErrorEvent,
    Event,
    ExecuteRequest,
    Metrics,
    Resume,
    Started,
    Token,
)
from wherry_router.backend import Work
from wherry_router.fault import WorkerFault

# Of errors that ask to be tried elsewhere: what a worker that is on its way out says. It did nothing wrong.
_LEAVING = frozenset({"shutting_down", "draining"})
# The version of an answer that workers of different models or settings have parts in.
SEVERAL = "several"


class Books(Protocol):
    """What tries are made of, and what they bring. `ids`: every token passed on, in order."""

    @property
    def ids(self) -> list[int]: ...

    def request(self, tries: int) -> Work:
        """What the next worker is asked, after `tries` that failed."""

    def take(self, event: Event) -> Event | None:
        """What of a worker's event the client gets.

        Raises:
            WorkerFault: the event does not follow on what was passed on, or it asks for another try.
        """


def books_of(request: Work, *, restarts: bool = False) -> Books:
    """Those of a request; `restarts` is a `Ledger`'s."""
    return EmbeddingLedger(request) if isinstance(request, EmbedRequest) else Ledger(request, restarts=restarts)


def _error(event: ErrorEvent) -> ErrorEvent:
    if not event.retryable:
        return event
    reason = "shutting_down" if event.code in _LEAVING else "worker_error"
    fault = WorkerFault(reason, f"{event.code}: {event.message}")
    fault.event = event
    raise fault


class EmbeddingLedger:
    """The books of a request for vectors. Every try begins it anew: vectors of two models must not be mixed, and two
    workers may have different ones while a deployment is updated."""

    __slots__ = ("_came", "_request", "_waits", "ids")

    def __init__(self, request: EmbedRequest) -> None:
        self._request = request
        self._waits = True  # for the try's `Started`
        self._came = 0
        self.ids: list[int] = []  # none ever: what came is worth nothing to another worker

    def request(self, tries: int) -> EmbedRequest:
        """See `Books`."""
        self._waits, self._came = True, 0
        first = self._request
        # The worker may be one that is still letting go of the try before.
        return first if not tries else msgspec.structs.replace(first, id=f"{first.id}~{tries}")

    def take(self, event: Event) -> Event:
        """See `Books`."""
        if type(event) is Started:
            if not self._waits:
                raise WorkerFault("protocol", "the answer started twice")
            self._waits = False
        elif type(event) is Embedding:
            if event.index != self._came or self._waits:
                raise WorkerFault("protocol", f"vector {event.index} came where {self._came} was due")
            self._came += 1
        elif type(event) is End:
            if event.finish_reason != "cancelled" and self._came != len(self._request.inputs):
                raise WorkerFault("protocol", f"{self._came} of {len(self._request.inputs)} vectors came")
        elif type(event) is ErrorEvent:
            return _error(event)
        return event


class Ledger:
    """One generation's books. `ids`: every token passed on, in order."""

    __slots__ = ("_request", "_restarts", "_started", "_waits", "ids")

    def __init__(self, request: ExecuteRequest, *, restarts: bool = False) -> None:
        """`restarts`: a new try begins the answer anew instead of going on with it."""
        self._request = request
        self._restarts = restarts
        self._started: Started | None = None
        self._waits = True  # for the try's `Started`
        self.ids: list[int] = []

    def request(self, tries: int) -> ExecuteRequest:
        """What the next worker is asked, after `tries` that failed."""
        first = self._request
        if self._restarts:
            self._started, self.ids = None, []
        self._waits = True
        if not tries:
            return first
        started = self._started
        return ExecuteRequest(
            # The worker may be one that is still letting go of the try before.
            id=f"{first.id}~{tries}",
            model=first.model,
            prompt=first.prompt,
            sampling=first.sampling,
            priority=first.priority,
            created=first.created,
            cache_salt=first.cache_salt,
            resume=None
            if started is None or not self.ids
            else Resume(token_ids=self.ids, seed=started.seed, prompt_digest=started.prompt_digest),
        )

    def take(self, event: Event) -> Event | None:
        """What of a worker's event the client gets.

        Raises:
            WorkerFault: the event does not follow on what was passed on, or it asks for another try.
        """
        if type(event) is Token:
            if event.index != len(self.ids) or self._waits:
                raise WorkerFault("protocol", f"token {event.index} came where {len(self.ids)} was due")
            self.ids += event.ids
            return event
        return self._other(event)

    def _other(self, event: Event) -> Event | None:
        if type(event) is Started:
            return self._start(event)
        if type(event) is End:
            return self._end(event)
        if type(event) is ErrorEvent:
            return _error(event)
        if type(event) is Metrics and self._waits:
            raise WorkerFault("protocol", "the answer ended before it started")
        return event

    def _start(self, event: Started) -> Event | None:
        first = self._started
        if not self._waits:
            raise WorkerFault("protocol", "the answer started twice")
        self._waits = False
        if first is None or not self.ids:
            self._started = event
            return event
        if (event.seed, event.prompt_tokens, event.prompt_digest) != (
            first.seed,
            first.prompt_tokens,
            first.prompt_digest,
        ):
            raise WorkerFault("protocol", "the worker goes on with another answer or another prompt")
        if event.version != first.version:
            first.version = SEVERAL
        return None

    def _end(self, event: End) -> Event:
        if event.finish_reason != "cancelled" and event.completion_tokens != len(self.ids):
            raise WorkerFault("protocol", f"{event.completion_tokens} tokens were counted, {len(self.ids)} came")
        if self._started is not None:
            # The client's prompt was cached as far as it was at first.
            event.cached_tokens = self._started.cached_tokens
        return event
