"""A request on its way through admission."""

import asyncio
import enum


class State(enum.Enum):
    """Where it is."""

    NEW = "new"
    QUEUED = "queued"
    RUNNING = "running"
    DONE = "done"


class Ticket:
    """One request.

    Attributes:
        rank: index of its class; 0 is the highest.
        tenant, weight: whose it is, and their share beside other tenants.
        prompt: tokens of its prompt, estimated.
        cost: tokens of prompt and answer, estimated; what fairness and bounds go by.
        slots: generations that it still needs a worker for.
        arrived, deadline: by admission's clock. At the deadline it leaves the queue.
        fresh: no load report knows of it yet.
        woken: resolved when a queued request may go on; fails with what it is refused with.
    """

    __slots__ = (
        "arrived",
        "cost",
        "deadline",
        "fresh",
        "order",
        "prompt",
        "rank",
        "slots",
        "state",
        "tenant",
        "weight",
        "woken",
    )

    def __init__(
        self,
        *,
        rank: int = 0,
        tenant: str = "",
        weight: float = 1.0,
        prompt: int = 0,
        cost: int = 1,
        slots: int = 1,
        arrived: float = 0.0,
        deadline: float = float("inf"),
    ) -> None:
        self.rank = rank
        self.tenant = tenant
        self.weight = weight
        self.prompt = prompt
        self.cost = cost
        self.slots = slots
        self.arrived = arrived
        self.deadline = deadline
        self.order = 0
        self.state = State.NEW
        self.fresh = False
        self.woken: asyncio.Future[None] | None = None
