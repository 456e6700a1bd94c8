"""Which texts are embedded together: requests take turns, so that a short one does not wait for a long one's end."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

from wherry_runtime.scheduling.scheduler import QueueFullError


@dataclass(slots=True, eq=False)
class EmbeddingRequest:
    """A request's texts, each by its token ids.

    Attributes:
        priority: higher runs first.
        dimensions: that its vectors are cut to; None: they are whole.
        taken: how many of the texts are computed or being computed.
        done: how many are computed.
        turn: number of the last batch that had one of them.
        gone: it was taken out of the queue.
        owed: tokens of those that are not.
    """

    id: str
    texts: Sequence[Sequence[int]]
    priority: int = 0
    dimensions: int | None = None
    taken: int = 0
    done: int = 0
    turn: int = 0
    gone: bool = False
    num_tokens: int = field(init=False)
    owed: int = field(init=False)

    def __post_init__(self) -> None:
        self.num_tokens = self.owed = sum(len(text) for text in self.texts)

    def book(self, index: int) -> bool:
        """The text at `index` is computed; whether it was the last one."""
        self.done += 1
        self.owed -= len(self.texts[index])
        return self.done == len(self.texts)


Batch = list[tuple[EmbeddingRequest, int]]


class EmbeddingQueue:
    """Requests in the order in which they get their turn. Not safe for threads.

    Args:
        max_running: requests that take turns; the others wait.
        max_queued: requests that may wait.
    """

    def __init__(self, max_running: int, max_queued: int) -> None:
        self.max_running = max_running
        self._max_queued = max_queued
        self._requests: list[EmbeddingRequest] = []
        self._turns = 0

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def running(self) -> int:
        """Requests that have had a turn."""
        return sum(request.taken > 0 for request in self._requests)

    @property
    def tokens_owed(self) -> int:
        """Tokens of texts that are not computed."""
        return sum(request.owed for request in self._requests)

    def add(self, request: EmbeddingRequest) -> None:
        """Queues it behind those of its priority and of higher ones.

        Raises:
            QueueFullError: as many are here as may run and wait.
        """
        limit = self.max_running + self._max_queued
        if len(self._requests) >= limit:
            raise QueueFullError(f"{limit} requests are running or waiting already")
        place = len(self._requests)
        while place and self._requests[place - 1].priority < request.priority:
            place -= 1
        self._requests.insert(place, request)

    def remove(self, request_id: str) -> EmbeddingRequest | None:
        """Takes it out; None: it is not here."""
        for place, request in enumerate(self._requests):
            if request.id == request_id:
                request.gone = True
                return self._requests.pop(place)
        return None

    def clear(self) -> list[EmbeddingRequest]:
        """Takes all out."""
        requests, self._requests = self._requests, []
        return requests

    def take(self, max_tokens: int) -> Batch:
        """The next texts to be computed together: of each request in turn one, those of a higher priority first, and
        `max_tokens` at most, but for a text that is longer and goes alone. Who had no turn for that comes first then.
        """
        batch: Batch = []
        left = max_tokens
        self._turns += 1
        turns = sorted(self._requests[: self.max_running], key=lambda request: (-request.priority, request.turn))
        for _, same in itertools.groupby(turns, key=lambda request: request.priority):
            given = list(same)
            while given:
                given = [request for request in given if self._fits(request, left, alone=not batch)]
                for request in given:
                    length = len(request.texts[request.taken])
                    if length > left and batch:
                        continue
                    batch.append((request, request.taken))
                    request.taken += 1
                    request.turn = self._turns
                    left -= length
        return batch

    @staticmethod
    def _fits(request: EmbeddingRequest, left: int, *, alone: bool) -> bool:
        return request.taken < len(request.texts) and (alone or len(request.texts[request.taken]) <= left)
