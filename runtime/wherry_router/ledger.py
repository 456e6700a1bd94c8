"""What a client has been given of one generation, and what another worker needs to go on with it.

Every event passes here on its way to the client. What does not follow on what was passed on before (a token left out,
or told twice) is the worker's fault, and never gets through.
"""

from wherry_protocol.worker import End, ErrorEvent, Event, ExecuteRequest, Metrics, Resume, Started, Token
from wherry_router.fault import WorkerFault

# Of errors that ask to be tried elsewhere: what a worker that is on its way out says. It did nothing wrong.
_LEAVING = frozenset({"shutting_down", "draining"})
# The version of an answer that workers of different models or settings have parts in.
SEVERAL = "several"


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
        if type(event) is ErrorEvent and event.retryable:
            reason = "shutting_down" if event.code in _LEAVING else "worker_error"
            fault = WorkerFault(reason, f"{event.code}: {event.message}")
            fault.event = event
            raise fault
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
