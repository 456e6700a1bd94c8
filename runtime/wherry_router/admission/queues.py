"""The decisions of admission: who goes on, who waits, who is refused. Pure: every call gets the time and the capacity.

Classes are served strictly by priority, within a class tenants get fair shares. What is over a bound is taken from the
lowest class first, and there from the newest of the tenant that is most over its share: who sends more than others
displaces its own requests.
"""

import heapq
import itertools
import math
from collections import deque
from typing import Literal

import msgspec

from wherry_router.admission.capacity import Capacity
from wherry_router.admission.classes import Classes
from wherry_router.admission.drain import Drain
from wherry_router.admission.fair import FairQueue
from wherry_router.admission.settings import Bounds
from wherry_router.admission.ticket import State, Ticket

Reason = Literal["queue_full", "shed", "too_slow", "timeout", "no_replica"]

MAX_RETRY_AFTER_S = 600
# A report that came just now may have been written before what was sent a moment ago arrived.
_IN_FLIGHT_S = 0.02
# The heap of deadlines is cleaned when it holds this many more than wait.
_STALE = 256


class Turned(msgspec.Struct, frozen=True):
    """A request that is refused. `retry_after_s`: when the queue will have been served that is there now."""

    ticket: Ticket
    reason: Reason
    retry_after_s: int


class Queues:
    """All queues, and what has been let through and is not over."""

    def __init__(self, classes: Classes, bounds: Bounds, now: float) -> None:
        self._classes = classes.all
        self._bounds = bounds
        self.queues = [FairQueue() for _ in self._classes]
        self.running = [0] * len(self._classes)  # slots that requests let through take, by class
        self.requests = 0  # that wait
        self.tokens = 0
        self._drains = [Drain(now) for _ in self._classes]
        self._all = Drain(now)
        self._fresh: deque[tuple[float, Ticket]] = deque()
        self._fresh_tokens = self._fresh_slots = 0
        self._deadlines: list[tuple[float, int, Ticket]] = []
        self._numbers = itertools.count()
        self._dark_since: float | None = None

    def offer(self, ticket: Ticket, now: float, capacity: Capacity) -> tuple[list[Ticket], list[Turned]]:
        """A request comes. Afterwards it runs, is queued, or is among those turned away.

        Returns:
            Queued requests that go on, and all that are refused: it, or others that it displaces.
        """
        if not self.requests and capacity.replicas and self._fits(ticket, capacity):
            self.queues[ticket.rank].pass_by(ticket)
            self._started(ticket, now, capacity)
            return [], []
        self._advance(now)
        wait_s = self.wait_s(ticket) if capacity.replicas else None
        if wait_s is not None and now + wait_s > ticket.deadline:
            ticket.state = State.DONE
            return [], [Turned(ticket, "too_slow", _seconds(wait_s))]
        self._push(ticket)
        passed = self.pump(now, capacity)
        turned: list[Turned] = []
        if ticket.state is State.QUEUED and ticket.deadline <= now:
            turned.append(self._turn(ticket, "too_slow"))
        return [one for one in passed if one is not ticket], turned + self._bound(ticket)

    def pump(self, now: float, capacity: Capacity) -> list[Ticket]:
        """Queued requests that go on now, in order."""
        passed: list[Ticket] = []
        if not self.requests:
            return passed
        self._advance(now)
        if not capacity.replicas:
            self._dark_since = now if self._dark_since is None else self._dark_since
            return passed
        self._dark_since = None
        for rank, queue in enumerate(self.queues):
            while (ticket := queue.head()) is not None and self._fits(ticket, capacity):
                queue.serve(ticket)
                self.requests -= 1
                self.tokens -= ticket.cost
                self._drains[rank].served(ticket.cost)
                self._all.served(ticket.cost)
                self._started(ticket, now, capacity)
                passed.append(ticket)
            if queue.requests:
                # Nobody overtakes the first in line, or a request of many choices would wait for ever.
                break
        return passed

    def expire(self, now: float) -> list[Turned]:
        """Queued requests whose time is over."""
        turned = []
        while self._deadlines and (self._deadlines[0][0] <= now or len(self._deadlines) > self.requests + _STALE):
            deadline, _, ticket = self._deadlines[0]
            if ticket.state is not State.QUEUED:
                heapq.heappop(self._deadlines)
            elif deadline <= now:
                turned.append(self._turn(ticket, "timeout"))
            else:
                self._deadlines = [entry for entry in self._deadlines if entry[2].state is State.QUEUED]
                heapq.heapify(self._deadlines)
        if self._dark_since is not None:
            dark = self._dark_since
            for ticket in [entry[2] for entry in self._deadlines if entry[2].state is State.QUEUED]:
                if now >= max(dark, ticket.arrived) + self._bounds.no_replica_s:
                    turned.append(self._turn(ticket, "no_replica"))
        return turned

    def next_deadline(self) -> float:
        """When `expire` has something to do at the earliest."""
        return self._deadlines[0][0] if self._deadlines else math.inf

    def freed(self, ticket: Ticket, slots: int = 1) -> None:
        """So many of the generations of a request that runs are over."""
        slots = min(slots, ticket.slots)
        ticket.slots -= slots
        self.running[ticket.rank] -= slots
        if ticket.fresh:
            self._fresh_slots -= slots

    def leave(self, ticket: Ticket, now: float, tokens: int = 0) -> None:
        """A request is over, or its client has left the queue. `tokens`: what it took of the workers."""
        if ticket.state is State.QUEUED:
            self._advance(now)
            self._remove(ticket)
        elif ticket.state is State.RUNNING:
            self.freed(ticket, ticket.slots)
            self._known(ticket)
            queue = self.queues[ticket.rank]
            queue.settle(ticket, tokens)
            queue.ended(ticket)
        ticket.state = State.DONE

    def wait_s(self, ticket: Ticket) -> float | None:
        """How long another request like this one would wait, at the rate of the last seconds; None: not known yet."""
        higher = sum(queue.tokens for queue in self.queues[: ticket.rank])
        ahead = self.queues[ticket.rank].ahead(ticket.tenant, ticket.weight)
        if not higher and not ahead:
            return 0.0
        total = self._all.rate()
        if total is None:
            return None
        return higher / total + ahead / (self._drains[ticket.rank].rate() or total)

    def _fits(self, ticket: Ticket, capacity: Capacity) -> bool:
        """Whether the workers can take it now. What runs of lower classes is no hindrance: the engine pauses that."""
        if capacity.limit == math.inf:
            return True
        equal = sum(self.running[: ticket.rank + 1])
        if max(min(ticket.slots, capacity.limit), 1) > capacity.limit - capacity.others - equal:
            return False
        if any(self.running[ticket.rank + 1 :]):
            return True
        self._reported(capacity)
        if self._fresh_tokens + ticket.prompt <= capacity.kv_free:
            return True
        return capacity.waiting + self._fresh_slots < capacity.queue

    def _started(self, ticket: Ticket, now: float, capacity: Capacity) -> None:
        ticket.state = State.RUNNING
        self.running[ticket.rank] += ticket.slots
        self._reported(capacity)
        if capacity.limit == math.inf:
            return
        ticket.fresh = True
        self._fresh_tokens += ticket.prompt
        self._fresh_slots += ticket.slots
        self._fresh.append((now, ticket))

    def _reported(self, capacity: Capacity) -> None:
        """What was let through before the reports were written is in them."""
        fresh = self._fresh
        while fresh and (not fresh[0][1].fresh or fresh[0][0] < capacity.since - _IN_FLIGHT_S):
            self._known(fresh.popleft()[1])

    def _known(self, ticket: Ticket) -> None:
        """It is in the load reports, or over."""
        if ticket.fresh:
            ticket.fresh = False
            self._fresh_tokens -= ticket.prompt
            self._fresh_slots -= ticket.slots

    def _advance(self, now: float) -> None:
        for queue, drain in zip(self.queues, self._drains, strict=True):
            drain.advance(now, waiting=queue.requests > 0)
        self._all.advance(now, waiting=self.requests > 0)

    def _push(self, ticket: Ticket) -> None:
        self.queues[ticket.rank].push(ticket)
        self.requests += 1
        self.tokens += ticket.cost
        ticket.state = State.QUEUED
        heapq.heappush(self._deadlines, (ticket.deadline, next(self._numbers), ticket))

    def _remove(self, ticket: Ticket) -> None:
        self.queues[ticket.rank].remove(ticket)
        self.requests -= 1
        self.tokens -= ticket.cost
        ticket.state = State.DONE

    def _turn(self, ticket: Ticket, reason: Reason) -> Turned:
        self._remove(ticket)
        wait_s = self.wait_s(ticket)
        return Turned(ticket, reason, _seconds(wait_s))

    def _bound(self, newest: Ticket) -> list[Turned]:
        """Brings the queues back within their bounds, which `newest` may have broken."""
        turned: list[Turned] = []
        rank, own = newest.rank, self._classes[newest.rank]
        requests, tokens = _or_inf(own.max_queued_requests), _or_inf(own.max_queued_tokens)
        if newest.state is State.QUEUED and newest.cost > min(tokens, self._bounds.max_tokens):
            # Nothing that is taken away would make room for it.
            return [self._turn(newest, "queue_full")]
        queue = self.queues[rank]
        while queue.requests > requests or queue.tokens > tokens:
            turned.append(self._displace(queue, newest))
        while self.requests > self._bounds.max_requests or self.tokens > self._bounds.max_tokens:
            lowest = next(queue for queue in reversed(self.queues) if queue.requests)
            turned.append(self._displace(lowest, newest))
        return turned

    def _displace(self, queue: FairQueue, newest: Ticket) -> Turned:
        victim = queue.victim()
        return self._turn(victim, "queue_full" if victim is newest else "shed")


def _or_inf(bound: int | None) -> float:
    return math.inf if bound is None else bound


def _seconds(wait_s: float | None) -> int:
    return 1 if wait_s is None else min(max(math.ceil(wait_s), 1), MAX_RETRY_AFTER_S)
