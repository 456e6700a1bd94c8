"""The thread that computes batches of texts. Requests come in at any time, what is computed goes out after each batch.

A batch that runs out of memory is made again, half as large. One that raises anything else is computed one text at a
time, so that only requests that cannot be computed fail.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from wherry_protocol.worker import ErrorEvent
from wherry_runtime.engine.core import IDLE_BEAT_S, EngineClosedError
from wherry_runtime.engine.failures import event_of, is_out_of_memory, release_memory
from wherry_runtime.scheduling.embedding import Batch, EmbeddingQueue, EmbeddingRequest

log = logging.getLogger(__name__)


class Computes(Protocol):
    """What the thread asks of a model."""

    def embed(self, texts: Sequence[Sequence[int]], dimensions: Sequence[int | None]) -> list[bytes | None]:
        """Each text's vector, cut to its dimensions; None where it is no number. May raise anything."""


@dataclass(slots=True, frozen=True)
class Computed:
    """News of a request: the vector of its text at `index`, that it is the last one, or what it failed of."""

    request_id: str
    index: int = 0
    vector: bytes = b""
    last: bool = False
    error: ErrorEvent | None = None


class EmbeddingCore:
    """The thread, and the ways to talk to it. All public methods may be called from any thread.

    Args:
        report: called on the thread, with what a batch brought.
        max_tokens: of a batch, but for a text that is longer.
    """

    def __init__(
        self, model: Computes, queue: EmbeddingQueue, report: Callable[[list[Computed]], None], max_tokens: int
    ) -> None:
        self.heartbeat = time.monotonic()
        self.batches = 0
        self.tokens = 0
        self._model = model
        self._queue = queue
        self._report = report
        self._max_tokens = max_tokens
        self._wake = threading.Condition()
        self._closing = False
        self._thread = threading.Thread(target=self._loop, name="wherry-embedding", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def add(self, request: EmbeddingRequest) -> None:
        """Queues a request.

        Raises:
            QueueFullError: as many are here as may run and wait.
            EngineClosedError: the engine is closing.
        """
        with self._wake:
            if self._closing:
                raise EngineClosedError("the engine is shutting down")
            self._queue.add(request)
            self._wake.notify()

    def cancel(self, request_id: str) -> bool:
        """Ends a request, of which nothing more is reported once this has returned. False: it is not here."""
        with self._wake:
            return self._queue.remove(request_id) is not None

    def close(self, timeout_s: float = 60.0) -> None:
        """Ends every request with an error that asks to retry elsewhere, and the thread. Blocks until it is gone."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.is_alive():
            self._thread.join(timeout_s)

    def counts(self) -> tuple[int, int, int]:
        """Requests that have had a turn, those that have not, and tokens that are not computed."""
        with self._wake:
            return self._queue.running, len(self._queue) - self._queue.running, self._queue.tokens_owed

    def _loop(self) -> None:
        while True:
            self.heartbeat = time.monotonic()
            with self._wake:
                if self._closing:
                    break
                batch = self._queue.take(self._max_tokens)
                if not batch:
                    self._wake.wait(IDLE_BEAT_S)
                    continue
            self._compute(batch)
        error = ErrorEvent(code="shutting_down", message="the engine shuts down", retryable=True)
        with self._wake:
            self._tell([Computed(request.id, error=error) for request in self._queue.clear()])

    def _compute(self, batch: Batch) -> None:
        try:
            texts = [request.texts[index] for request, index in batch]
            vectors = self._model.embed(texts, [request.dimensions for request, _ in batch])
        except Exception as error:
            self._recover(batch, error.with_traceback(None))  # whose frames hold the batch's tensors
            return
        self.batches += 1
        self._settle(batch, vectors)

    def _settle(self, batch: Batch, vectors: list[bytes | None]) -> None:
        told = []
        with self._wake:
            for (request, index), vector in zip(batch, vectors, strict=True):
                if request.gone:
                    continue
                if vector is None:
                    self._fail(request, ErrorEvent(code="bad_vector", message="the model computed no number"))
                    continue
                self.tokens += len(request.texts[index])
                last = request.book(index)
                told.append(Computed(request.id, index, vector, last))
                if last:
                    self._queue.remove(request.id)
            self._tell(told)

    def _recover(self, batch: Batch, error: Exception) -> None:
        if len(batch) == 1:
            log.error("a text cannot be embedded: %s: %s", type(error).__name__, error)
            with self._wake:
                self._fail(batch[0][0], event_of(error))
            return
        if is_out_of_memory(error):
            release_memory()
            self._max_tokens = max(self._max_tokens // 2, 1)
            log.warning("a batch of %d texts ran out of memory; the next have %d tokens", len(batch), self._max_tokens)
            half = len(batch) // 2
            self._compute(batch[:half])
            self._compute(batch[half:])
            return
        log.warning("a batch of %d texts failed; each is computed alone", len(batch), exc_info=error)
        for one in batch:
            self._compute([one])

    def _fail(self, request: EmbeddingRequest, error: ErrorEvent) -> None:
        if self._queue.remove(request.id) is not None:
            self._tell([Computed(request.id, error=error)])

    def _tell(self, news: list[Computed]) -> None:
        """While the lock is held, so that nothing is told of a request that was cancelled before."""
        if news:
            self._report(news)
