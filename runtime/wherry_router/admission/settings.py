"""What admission is told at its start, and the bounds it keeps."""

import msgspec

from wherry_router.admission.classes import PriorityClass


class Bounds(msgspec.Struct, frozen=True, kw_only=True):
    """Of all queues of a router together. `no_replica_s`: how long a request waits while no replica is ready."""

    max_requests: int = 1000
    max_tokens: int = 4_000_000
    no_replica_s: float = 30.0


class QueueSettings(msgspec.Struct, frozen=True, kw_only=True):
    """`timeout_s`: how long a request waits that does not say so itself."""

    classes: tuple[PriorityClass, ...] = ()
    bounds: Bounds = Bounds()
    timeout_s: float = 60.0
