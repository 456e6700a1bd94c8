"""Whose fault a failed try was, and how much of the worker it says something about. Pure."""

from enum import Enum


class Blame(Enum):
    """What a failed try says about the worker."""

    NONE = "none"  # it is well: full, on its way out, or the router's own mistake
    REQUEST = "request"  # it failed this request; the next may work
    WORKER = "worker"  # it is away as a whole: nobody should wait for it again


_BLAME = {
    "queue_full": Blame.NONE,
    "unauthorized": Blame.NONE,
    "draining": Blame.NONE,
    "shutting_down": Blame.NONE,
    "worker_error": Blame.REQUEST,
    "protocol": Blame.REQUEST,
    "not_ready": Blame.WORKER,
    "unreachable": Blame.WORKER,
    "lost": Blame.WORKER,
    "frozen": Blame.WORKER,
}


def blame(reason: str) -> Blame:
    """Of a `WorkerFault`'s reason. What is not known is held against the request only."""
    return _BLAME.get(reason, Blame.REQUEST)
