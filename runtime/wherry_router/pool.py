"""The replicas that requests can go to now, what each owes, and how each has done lately."""

import asyncio
import itertools
import logging
import random
import time
from collections.abc import Callable, Collection, Iterable, Mapping

import msgspec
from prometheus_client import CollectorRegistry

from wherry_protocol.router_report import ReplicaReport, ReplicaState
from wherry_protocol.worker import Embedding, End, Event, LoadReport, LoadUpdate, Started, Token
from wherry_router.asks import Asks, expected_output
from wherry_router.metrics import RouterMetrics
from wherry_router.policies import ANYTHING, Ask, Policy
from wherry_router.policies.hashing import identity_of
from wherry_router.policies.least_tokens import LeastTokens
from wherry_router.prefix_view import PrefixView
from wherry_router.resilience.breaker import Breaker, State
from wherry_router.resilience.budget import RetryBudget, backoff_s
from wherry_router.resilience.faults import Blame, blame
from wherry_router.resilience.outlier import Record, Rules, outliers
from wherry_router.resilience.panic import panics
from wherry_router.settings import Limits

log = logging.getLogger("wherry.router")

_JUDGE_EVERY_S = 1.0
# Breakers also change by time alone, which wakes nobody.
_LOOK_AGAIN_S = 0.25


class Endpoint(msgspec.Struct, frozen=True):
    """Where a worker listens. `name` (a pod's name and UID) tells a worker from its successor at the same address."""

    name: str
    url: str


class Replica:
    """One worker as this router sees it.

    `draining`: it gets no new request. `drain_deadline` (event loop's time): when what still runs there is to go on
    elsewhere; None: never, the worker ends it itself. Both may change, and change back, while requests run.

    `load`: what it last pushed, 100 ms old at most unless nothing has changed; None while it pushes nothing. What this
    router itself has there is counted by its own books, to the moment; a report adds what others have.
    """

    __slots__ = (
        "breaker",
        "drain_deadline",
        "draining",
        "endpoint",
        "foreign_requests",
        "foreign_tokens",
        "identity",
        "last_chosen",
        "load",
        "outstanding_tokens",
        "prefixes",
        "record",
        "requests",
    )

    def __init__(self, endpoint: Endpoint, limits: Limits | None = None) -> None:
        limits = limits or Limits()
        self.endpoint = endpoint
        self.draining = False
        self.drain_deadline: float | None = None
        self.outstanding_tokens = 0
        self.requests = 0
        self.load: LoadReport | None = None
        self.foreign_requests = 0
        self.foreign_tokens = 0
        self.prefixes = PrefixView()
        self.identity = identity_of(endpoint.name)
        self.last_chosen = 0
        self.breaker = Breaker(limits.breaker_faults, limits.breaker_max_open_s)
        self.record = Record()

    def out(self, now: float) -> bool:
        """Whether it failed lately: its breaker is not closed, or it is ejected."""
        return self.breaker.state is not State.CLOSED or self.record.ejected(now)

    @property
    def load_requests(self) -> int:
        """See `Candidate`."""
        return self.requests + self.foreign_requests

    @property
    def load_tokens(self) -> int:
        """See `Candidate`."""
        return self.outstanding_tokens + self.foreign_tokens

    def cached_tokens(self, ask: Ask) -> int:
        """See `Candidate`."""
        return min(int(self.prefixes.match(ask.keys) * ask.tokens_per_key), ask.prompt_tokens)

    def reported(self, load: LoadReport | None) -> None:
        """Its load now; None: it no longer tells."""
        self.load = load
        live = load.running + load.waiting if load is not None else 0
        self.foreign_requests = max(live - self.requests, 0)
        # Estimates differ a little, so without another's request there is nothing of others.
        owed = load.tokens_owed if load is not None and self.foreign_requests else 0
        self.foreign_tokens = max(owed - self.outstanding_tokens, 0)


class Lease:
    """One request on its replica: what it makes the replica owe, and what it tells of the replica.

    What is owed is estimated at first, put right by the events, and nothing after `release`.
    """

    __slots__ = ("_ask", "_began", "_epoch", "_output", "_pool", "_prompt", "_replica", "_trial")

    def __init__(
        self, pool: "Pool", replica: Replica, prompt_estimate: int, max_tokens: int | None, ask: Ask = ANYTHING
    ) -> None:
        self._pool = pool
        self._replica = replica
        self._prompt = prompt_estimate
        self._output = expected_output(max_tokens)
        self._ask = ask
        replica.requests += 1
        replica.outstanding_tokens += self._prompt + self._output
        self._began: float | None = pool.clock()
        if ask.keys:
            replica.prefixes.expect(ask.keys, self._began)
        self._trial = replica.breaker.begin(self._began)
        self._epoch = replica.breaker.epoch

    def observe(self, event: Event) -> None:
        """Puts the estimate right, and notes that the worker works."""
        if type(event) is Token:
            self._answered()
            # The prompt has been read. One token stays owed until the end, however long the answer gets.
            output = max(self._output - len(event.ids), 1)
            self._replica.outstanding_tokens -= self._prompt + self._output - output
            self._prompt, self._output = 0, output
        elif type(event) is Started:
            prompt = max(event.prompt_tokens - event.cached_tokens, 0)
            self._pool.started(self._ask, event)
            self._replica.outstanding_tokens += prompt - self._prompt
            self._prompt = prompt
        elif type(event) is Embedding:
            self._answered()
        elif type(event) is End:
            self._pool.completed(self._replica)

    def _answered(self) -> None:
        if self._began is not None:
            self._pool.answered(self._replica, self._began)
            self._began = None
        self._epoch = self._replica.breaker.epoch

    def failed(self, reason: str) -> None:
        """The try failed; `reason` is a `WorkerFault`'s. A refusal of the request itself (4xx) is none."""
        self._pool.failed(self._replica, self._epoch, reason)

    def release(self) -> None:
        """The request is over."""
        self._replica.requests -= 1
        self._replica.outstanding_tokens -= self._prompt + self._output
        self._prompt = self._output = 0
        if self._ask.keys:
            self._replica.prefixes.over(self._ask.keys, self._pool.clock())
        self._replica.breaker.ended(self._trial)
        self._pool.released(self._replica)


class Pool:
    """The current replicas. Discovery replaces the set; requests choose from it and tell how it went."""

    def __init__(
        self,
        limits: Limits | None = None,
        metrics: RouterMetrics | None = None,
        on_open: Callable[[Replica], None] = lambda _: None,
        clock: Callable[[], float] = time.monotonic,
        policy: Policy | None = None,
        on_replicas: Callable[[], None] = lambda: None,
    ) -> None:
        self._policy = policy or LeastTokens()
        self.asks = Asks(with_keys=self._policy.reads_prefixes)
        self._on_replicas = on_replicas
        self._limits = limits or Limits()
        self._metrics = metrics or RouterMetrics(CollectorRegistry())
        self._on_open = on_open
        self.clock = clock
        self._replicas: dict[Endpoint, Replica] = {}
        self._leaving: dict[Endpoint, Replica] = {}  # no longer named, but requests still run there
        self._turns = itertools.count(1)
        self._changed = asyncio.Event()
        self._budget = RetryBudget(self._limits.retry_share, self._limits.retry_min_per_s)
        self._rules = Rules(
            self._limits.eject_share,
            self._limits.eject_s,
            self._limits.eject_fault_rate,
            self._limits.eject_ttft_factor,
        )
        self._judged = float("-inf")
        self._panicked = False
        self.known = False  # discovery has spoken at least once
        self._metrics.watch_pool(self)

    # What discovery says.

    def set_endpoints(
        self, endpoints: Iterable[Endpoint], draining: Mapping[Endpoint, float | None] | None = None
    ) -> None:
        """What discovery found. Replicas that stay keep their state; requests on those that went run on.

        `draining`: those of `endpoints` that get no new request, each with its `drain_deadline`.
        """
        before, known = self._replicas, self._leaving | self._replicas
        self._replicas = {e: known.get(e) or Replica(e, self._limits) for e in endpoints}
        self._leaving = {e: r for e, r in known.items() if e not in self._replicas and r.requests}
        draining = draining or {}
        for endpoint, replica in self._replicas.items():
            replica.draining = endpoint in draining
            replica.drain_deadline = draining.get(endpoint)
            if endpoint not in before and replica.breaker.state is not State.CLOSED:
                # It is back with what still runs there, and nobody probes it any more.
                self._on_open(replica)
        self.known = True
        self._changed.set()
        self._on_replicas()

    def replicas(self) -> Collection[Replica]:
        """Every replica that discovery names, draining ones too."""
        return self._replicas.values()

    def has(self, replica: Replica) -> bool:
        """Whether discovery still names it."""
        return self._replicas.get(replica.endpoint) is replica

    def report(self) -> list[ReplicaReport]:
        """What the operator is told."""
        now = self.clock()
        return [
            ReplicaReport(name=r.endpoint.name, state=self.state(r, now), in_flight=r.requests)
            for r in (*self._replicas.values(), *self._leaving.values())
        ]

    def state(self, replica: Replica, now: float) -> ReplicaState:
        """In one word."""
        if replica.draining or not self.has(replica):
            return "draining"
        return "suspect" if replica.out(now) else "routable"

    def states(self) -> list[str]:
        """Each named replica's `state`, for metrics."""
        now = self.clock()
        return [self.state(replica, now) for replica in self._replicas.values()]

    def breaker_states(self) -> list[str]:
        """Each named replica's breaker's state, for metrics."""
        return [replica.breaker.state.value for replica in self._replicas.values()]

    # What a request asks.

    def choose(self, tried: Collection[Replica], ask: Ask = ANYTHING) -> Replica | None:
        """The replica for the next try of a request; never one of `tried`."""
        now = self.clock()
        usable = [r for r in self._usable(now) if r not in tried and self._has_room(r)]
        chosen = self._by_policy([r for r in usable if r.breaker.trial_due(now)] or usable, ask)
        if chosen is not None and not tried:
            self._budget.request(now)
        return chosen

    def choose_successor(self, tried: Collection[Replica], ask: Ask = ANYTHING) -> Replica | None:
        """The replica on which an answer goes on that has begun; never one of `tried`.

        It was admitted before and its client has seen a part of it, so the bulkhead does not hold it back. It is not
        what tests a half-open replica while another is well, and no panic sends it to one that does not answer probes:
        it can wait. One that drains and is well is better than none.
        """
        now = self.clock()
        left = [r for r in self._replicas.values() if r not in tried]
        usable = [r for r in left if not r.draining and not r.out(now)]
        if not usable:
            usable = [
                r for r in left if not r.draining and (r.breaker.state is not State.OPEN or r.breaker.trial_due(now))
            ]
        if not usable:
            usable = [r for r in left if r.draining and not r.out(now)]
        return self._by_policy(usable, ask)

    def has_another(self, replica: Replica) -> bool:
        """Whether what runs on `replica` could go on elsewhere at once."""
        now = self.clock()
        return any(not r.draining and not r.out(now) for r in self._replicas.values() if r is not replica)

    def _by_policy(self, usable: list[Replica], ask: Ask) -> Replica | None:
        if not usable:
            return None
        index, reason = self._policy.choose(usable, ask)
        self._metrics.decided(reason)
        chosen = usable[index]
        chosen.last_chosen = next(self._turns)
        return chosen

    def lacks_room(self, tried: Collection[Replica]) -> bool:
        """Whether it is the bulkhead alone that keeps a request from a replica it has not tried."""
        now = self.clock()
        return any(r not in tried and not self._has_room(r) for r in self._usable(now))

    def retry_pause(self, reason: str, retries: int) -> float | None:
        """Seconds to wait before a request is tried on another replica; None: it may not be. Not for resumes.

        The first move away from a worker that is gone is free, like a resume: its breaker bounds how many there are.
        """
        now = self.clock()
        free = retries == 0 and blame(reason) is Blame.WORKER and not self.panicking(now)
        if not free and not self._budget.take(now):
            self._metrics.retries_denied.inc()
            return None
        return 0.0 if free else backoff_s(retries, random.random())  # noqa: S311 - not a secret

    def lease(self, replica: Replica, prompt_estimate: int, max_tokens: int | None, ask: Ask = ANYTHING) -> Lease:
        """To be held while a request runs on `replica`. `prompt_estimate`: tokens that it is to read."""
        return Lease(self, replica, prompt_estimate, max_tokens, ask)

    async def wait(self, timeout_s: float) -> None:
        """Until there is a replica that may be chosen, `timeout_s` at most."""
        try:
            async with asyncio.timeout(timeout_s):
                while self.choosable() == 0:
                    await self.change()
        except TimeoutError:
            pass

    async def change(self) -> None:
        """Until something may have changed of what can be chosen, a moment at most."""
        self._changed.clear()
        try:
            async with asyncio.timeout(_LOOK_AGAIN_S):
                await self._changed.wait()
        except TimeoutError:
            pass

    def choosable(self) -> int:
        """How many replicas a request could go to now, room or not."""
        return len(self._usable(self.clock()))

    def usable(self) -> list[Replica]:
        """The replicas that a request could go to now, room or not."""
        return self._usable(self.clock())

    def requests(self) -> int:
        """What this router has running on all replicas, those that discovery no longer names included."""
        return sum(replica.requests for replica in (*self._replicas.values(), *self._leaving.values()))

    def panicking(self, now: float) -> bool:
        """Whether so many replicas look bad that all of them are used."""
        serving = [r for r in self._replicas.values() if not r.draining]
        panic = panics(len(serving), sum(r.out(now) for r in serving), self._limits.panic_share)
        if panic != self._panicked:
            self._panicked = panic
            log.warning("panic" if panic else "panic is over", extra={"fields": {"replicas": len(serving)}})
            if panic:
                self._metrics.panics.inc()
        return panic

    def _usable(self, now: float) -> list[Replica]:
        serving = [r for r in self._replicas.values() if not r.draining]
        if self.panicking(now):
            return serving
        return [r for r in serving if r.breaker.allows(now) and not r.record.ejected(now)]

    def _has_room(self, replica: Replica) -> bool:
        return replica.requests < self._limits.max_per_replica

    # What requests, probes and reports tell.

    def reported(self, replica: Replica, update: LoadUpdate | None) -> None:
        """A load report came; None: there are none any more.

        Raises:
            ValueError: its prefixes cannot be read.
        """
        replica.reported(None if update is None else update.load)
        if update is not None and update.prefixes is not None:
            replica.prefixes.apply(update.prefixes)

    def started(self, ask: Ask, event: Started) -> None:
        """A worker begins with a request."""
        self.asks.learn(ask, event.prompt_tokens)
        self._metrics.read_prompt(event.prompt_tokens, event.cached_tokens)

    def answered(self, replica: Replica, began: float) -> None:
        """A request's first token came."""
        now = self.clock()
        replica.record.ttft(now, now - began)
        before = replica.breaker.state
        replica.breaker.answered(now)
        self._turned(replica, before)

    def completed(self, replica: Replica) -> None:
        """A request's answer is whole."""
        now = self.clock()
        replica.record.result(now, fault=False)
        replica.breaker.completed()
        self._judge(now)

    def failed(self, replica: Replica, epoch: int, reason: str) -> None:
        """A request's try failed; the worker last lived for it at the breaker's `epoch`."""
        now = self.clock()
        before = replica.breaker.state
        if replica.breaker.failed(epoch, blame(reason), now):
            replica.record.result(now, fault=True)
            self._turned(replica, before, reason)
            self._judge(now)

    def probed(self, replica: Replica, *, well: bool) -> None:
        """What a probe of an open or half-open replica found."""
        before = replica.breaker.state
        replica.breaker.probed(well=well, now=self.clock())
        self._turned(replica, before)

    def released(self, replica: Replica) -> None:
        """A request is no longer there."""
        if not replica.requests:
            self._leaving.pop(replica.endpoint, None)

    def _turned(self, replica: Replica, before: State, reason: str = "") -> None:
        state = replica.breaker.state
        if state is before:
            return
        fields = {"replica": replica.endpoint.name, "from": before.value, "to": state.value}
        log.info("breaker", extra={"fields": fields | ({"reason": reason} if reason else {})})
        self._changed.set()
        if state is State.OPEN and reason:
            self._metrics.breaker_opened(reason)
            self._on_open(replica)

    def _judge(self, now: float) -> None:
        """Ejects who does visibly worse than the others."""
        if now - self._judged < _JUDGE_EVERY_S:
            return
        self._judged = now
        serving = [r for r in self._replicas.values() if not r.draining]
        for index, cause in outliers([r.record.view(now) for r in serving], self._rules):
            serving[index].record.eject(now, self._rules)
            self._metrics.ejected(cause)
            fields = {"replica": serving[index].endpoint.name, "cause": cause}
            log.warning("replica is ejected", extra={"fields": fields})
