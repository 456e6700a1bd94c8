"""How the tries of one generation have gone, and what that leaves to do. Pure: every call gets the time."""

from wherry_protocol.worker import ErrorEvent
from wherry_router.backend import Delivery
from wherry_router.fault import QueueFull, WorkerFault
from wherry_router.ledger import Books
from wherry_router.pool import Replica
from wherry_router.settings import Limits

# A worker that was never reached, or had no room, says nothing of what the request does to workers.
_HARMLESS = frozenset({"unreachable", "not_ready", "queue_full", "unauthorized", "draining", "shutting_down"})


class Tries:
    """`failed`: how many, and `tried`: on which replicas, since the last new token or since all had their turn."""

    __slots__ = (
        "_began",
        "_delivery",
        "_fruitless",
        "_ledger",
        "_limits",
        "error",
        "failed",
        "fault",
        "full",
        "going_on",
        "lost_at",
        "rounds",
        "stuck",
        "tried",
    )

    def __init__(self, limits: Limits, now: float, delivery: Delivery, ledger: Books) -> None:
        self._limits = limits
        self._began = now
        self._delivery = delivery
        self._ledger = ledger
        self._fruitless = 0  # tries in a row that a worker took on and that brought no new token
        self.rounds = 0  # times that every replica was tried without one
        self.failed = 0
        self.tried: list[Replica] = []
        self.fault: WorkerFault | None = None
        self.full: QueueFull | None = None
        self.lost_at: float | None = None  # last sign of the worker that had the answer, until it goes on
        self.going_on = False  # since the last failure, with an answer of which the client has a part
        self.stuck = True  # no token has come since the last failure, or ever
        self.error: ErrorEvent | None = None  # what ends the answer

    @property
    def begun(self) -> bool:
        """Whether the client has a part of this very generation."""
        return bool(self._ledger.ids)

    @property
    def resuming(self) -> bool:
        """Whether the next try goes on with an answer, rather than being one of a request that may still be refused."""
        return self._limits.resume and self._delivery.begun and self.failed > 0

    @property
    def movable(self) -> bool:
        """Whether it may be moved from a worker that is well, without loss."""
        return self._limits.resume or not self.begun

    @property
    def deadline(self) -> float:
        """When the next token must have come."""
        if self.lost_at is not None and self.going_on:
            return self.lost_at + self._limits.resume_wait_s
        return self._began + self._limits.first_token_timeout_s

    def note(self, replica: Replica, fault: WorkerFault, now: float) -> None:
        """A try failed."""
        self.failed += 1
        self.tried.append(replica)
        self.fault = fault
        self.full = fault if isinstance(fault, QueueFull) else self.full
        self.stuck = True
        self.going_on = self._limits.resume and self.begun
        if self.lost_at is None:
            self.lost_at = now if fault.since is None else fault.since
        self._fruitless += fault.reason not in _HARMLESS
        self._judge()

    def _judge(self) -> None:
        if not self._delivery.begun:
            return
        if self._limits.resume:
            # The failure after a token is the first of its row, so one more than the tries that were to mend it.
            if self._fruitless > self._limits.max_resume_tries:
                self.end("resume_failed", f"{self._fruitless} tries in a row brought no token; the last: {self.fault}")
        elif not self._delivery.whole:
            self.end("worker_lost", "The replica that was answering is gone.")

    def moved_on(self) -> None:
        """A token came."""
        self._delivery.begun = True
        self.tried.clear()
        self.full = None
        self.lost_at = None
        self.stuck = self.going_on = False
        self._fruitless = self.rounds = 0

    def again(self) -> None:
        """Every replica had its turn: all may be tried anew."""
        self.tried.clear()
        self.rounds += 1

    def left(self, now: float) -> float:
        """Seconds that a try which goes on may still be waited for; at 0 the answer has ended."""
        lost_at = self._began if self.lost_at is None else self.lost_at
        left = lost_at + self._limits.resume_wait_s - now
        if left <= 0:
            self.expire()
        return max(left, 0.0)

    def expire(self) -> None:
        """No try that goes on brought a token in time."""
        self.end("resume_timeout", f"No replica went on with the answer within {self._limits.resume_wait_s:g} s.")

    def end(self, code: str, message: str) -> None:
        """Nothing more is tried."""
        self.error = ErrorEvent(code=code, message=message, retryable=True)
