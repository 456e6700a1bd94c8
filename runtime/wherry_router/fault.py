"""What a failed try is told as inside the router."""

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import ErrorEvent


class WorkerFault(Exception):
    """The worker failed, not the request.

    `reason` is one of a few words, for metrics; `since`, in the event loop's time, when the worker was last heard of,
    where that was before now.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.since: float | None = None
        self.event: ErrorEvent | None = None  # what the worker itself said of it


class QueueFull(WorkerFault):
    """The worker is well and has no room. `refusal` is what the client gets when every replica says so."""

    def __init__(self, refusal: ApiError) -> None:
        super().__init__("queue_full", refusal.message)
        self.refusal = refusal


class Expired(ApiError):
    """No token came in time, though the worker is alive."""

    def __init__(self, seconds: float) -> None:
        super().__init__(504, "first_token_timeout", f"No token came within {seconds:.0f} s.", retry_after_s=5)
