"""A fair share between tenants by token cost: a virtual token counter for each (Sheng et al., 2024,
https://arxiv.org/abs/2401.00588).

A tenant's counter grows by the tokens that it is served, divided by its weight; the queue's next request is the oldest
of the tenant with the smallest counter. Tenants that all wait are served in proportion to their weights, whatever
number of requests each sends. Who comes back begins at the virtual time, the counter of whoever was served last: time
in which it asked for nothing gives it no claim. Costs are estimated when a request is served and put right when it
ends. Pure: it knows no clock.
"""

from collections import OrderedDict

from wherry_router.admission.ticket import Ticket

# Tenants that are remembered although nothing of theirs waits or runs. What is forgotten is a debt of some requests.
MAX_IDLE = 4096


class Lane:
    """One tenant's part of a queue. `tokens`: of what waits. `live`: its requests that wait or run."""

    __slots__ = ("counter", "live", "tickets", "tokens", "weight")

    def __init__(self, counter: float) -> None:
        self.counter = counter
        self.weight = 1.0
        self.tickets: OrderedDict[int, Ticket] = OrderedDict()
        self.tokens = 0
        self.live = 0


class FairQueue:
    """The queue of one class."""

    def __init__(self) -> None:
        self.requests = 0
        self.tokens = 0
        self._virtual = 0.0
        self._lanes: dict[str, Lane] = {}
        self._active: dict[str, Lane] = {}  # with something that waits
        self._orders = 0

    def push(self, ticket: Ticket) -> None:
        """Queues a request."""
        lane = self._join(ticket)
        ticket.order = self._orders = self._orders + 1
        lane.tickets[ticket.order] = ticket
        lane.tokens += ticket.cost
        self._active[ticket.tenant] = lane
        self.requests += 1
        self.tokens += ticket.cost

    def head(self) -> Ticket | None:
        """The request that is served next."""
        if not self._active:
            return None
        lane = min(self._active.values(), key=lambda lane: (lane.counter, next(iter(lane.tickets))))
        return next(iter(lane.tickets.values()))

    def remove(self, ticket: Ticket) -> None:
        """Takes a request out that was not served."""
        self._take(ticket)
        self.ended(ticket)

    def serve(self, ticket: Ticket) -> None:
        """Serves a request that waits here, and charges its tenant."""
        self._take(ticket)
        self._charge(self._lanes[ticket.tenant], ticket)

    def pass_by(self, ticket: Ticket) -> None:
        """Serves a request that did not have to wait."""
        self._charge(self._join(ticket), ticket)

    def settle(self, ticket: Ticket, tokens: int) -> None:
        """A request that was served took `tokens` in place of its estimate. Before `ended`."""
        self._lanes[ticket.tenant].counter += (tokens - ticket.cost) / ticket.weight

    def ended(self, ticket: Ticket) -> None:
        """A request neither waits nor runs any more."""
        lane = self._lanes[ticket.tenant]
        lane.live -= 1
        if not lane.live and lane.counter <= self._virtual:
            # It would begin at the virtual time anyway.
            del self._lanes[ticket.tenant]

    def victim(self) -> Ticket:
        """The newest request of the tenant whose waiting tokens are the most for its weight."""
        lane = max(self._active.values(), key=lambda lane: (lane.tokens / lane.weight, next(reversed(lane.tickets))))
        return lane.tickets[next(reversed(lane.tickets))]

    def ahead(self, tenant: str, weight: float) -> float:
        """Tokens that wait here and are served before another request of `tenant`."""
        lane = self._lanes.get(tenant)
        own = lane.tokens if lane is not None else 0
        start = self._virtual if lane is None else lane.counter if lane.tickets else max(lane.counter, self._virtual)
        start += own / weight
        tokens = float(own)
        for name, other in self._active.items():
            if name != tenant:
                tokens += min(other.tokens, max(start - other.counter, 0.0) * other.weight)
        return tokens

    def _join(self, ticket: Ticket) -> Lane:
        lane = self._lanes.get(ticket.tenant)
        if lane is None:
            if len(self._lanes) >= MAX_IDLE:
                self._forget()
            lane = self._lanes[ticket.tenant] = Lane(self._virtual)
        if not lane.tickets:
            lane.counter = max(lane.counter, self._virtual)
        lane.weight = ticket.weight
        lane.live += 1
        return lane

    def _take(self, ticket: Ticket) -> None:
        lane = self._lanes[ticket.tenant]
        del lane.tickets[ticket.order]
        lane.tokens -= ticket.cost
        if not lane.tickets:
            del self._active[ticket.tenant]
        self.requests -= 1
        self.tokens -= ticket.cost

    def _charge(self, lane: Lane, ticket: Ticket) -> None:
        self._virtual = max(self._virtual, lane.counter)
        lane.counter += ticket.cost / ticket.weight

    def _forget(self) -> None:
        idle = sorted((lane.counter, name) for name, lane in self._lanes.items() if not lane.live)
        for _, name in idle[: len(idle) // 2 + 1]:
            del self._lanes[name]
