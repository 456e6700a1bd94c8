"""The backend that spreads requests over replicas, and goes on elsewhere with the answers of one that fails."""

import asyncio
import functools
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.router_report import ReplicaReport
from wherry_protocol.worker import End, Event, ExecuteRequest, Token
from wherry_router.backend import Delivery, Work
from wherry_router.fault import Expired, WorkerFault
from wherry_router.ledger import books_of
from wherry_router.load_feed import LoadFeed
from wherry_router.metrics import RouterMetrics
from wherry_router.policies import Ask, Policy
from wherry_router.pool import Pool, Replica
from wherry_router.resilience.budget import backoff_s
from wherry_router.resilience.prober import Prober
from wherry_router.settings import Limits
from wherry_router.tries import Tries
from wherry_router.upstream import Upstream

log = logging.getLogger("wherry.router")

_encode = msgspec.json.Encoder().encode
_PROGRESS = (Token, End)


class Replicas:
    """A `Backend` over the pool."""

    def __init__(
        self, upstream: Upstream, limits: Limits, metrics: RouterMetrics, policy: Policy | None = None
    ) -> None:
        self._prober = Prober(upstream.ask)
        self._feed = LoadFeed(upstream.watch_load)
        self.pool = Pool(
            limits,
            metrics,
            on_open=lambda replica: self._prober.watch(self.pool, replica),
            policy=policy,
            on_replicas=lambda: self._feed.follow(self.pool),
        )
        self._upstream = upstream
        self._limits = limits
        self._metrics = metrics

    def unready(self) -> str | None:
        """A router is ready once it knows which replicas there are, even if there are none."""
        return None if self.pool.known else "the replicas are not known yet"

    async def close(self) -> None:
        """Ends the probes and the load reports."""
        await self._feed.close()
        await self._prober.close()

    def report(self) -> list[ReplicaReport]:
        """What the operator is told of each replica."""
        return self.pool.report()

    async def generate(self, request: Work, correlation_id: str, delivery: Delivery) -> AsyncGenerator[Event, None]:
        """See `Backend.generate`. Until the first token (the last vector) each replica is tried once at most."""
        now = asyncio.get_running_loop().time
        ledger = books_of(request, restarts=delivery.whole and not self._limits.resume)
        path, output = (
            ("/execute", request.sampling.max_tokens) if isinstance(request, ExecuteRequest) else ("/embed", 0)
        )
        tries = Tries(self._limits, now(), delivery, ledger)
        ask = self.pool.asks.of(request, delivery.session)
        while (replica := await self._next(tries, ask)) is not None:
            body = _encode(ledger.request(tries.failed))
            prompt = ask.prompt_tokens - replica.cached_tokens(ask) + len(ledger.ids)
            lease = self.pool.lease(replica, prompt, output, ask)
            leaves = functools.partial(self._leaves, replica, tries)
            stream = self._upstream.execute(replica, body, correlation_id, tries.deadline, leaves, path)
            try:
                async with aclosing(stream) as events:
                    async for event in events:
                        lease.observe(event)
                        told = ledger.take(event)
                        if tries.stuck and type(told) in _PROGRESS:
                            self._moved_on(tries, now())
                        if told is not None:
                            yield told
                return  # noqa: TRY300 - the generator's own errors are none of the worker
            except WorkerFault as error:
                lease.failed(error.reason)
                tries.note(replica, error, now())
                self._log(replica, error, request.id, correlation_id)
            except Expired:
                if not tries.begun:
                    raise
                tries.expire()
            except ApiError as error:
                if not tries.begun:
                    raise
                # The request was good when the answer began, so it is this worker that cannot go on with it.
                refused = WorkerFault("refused", f"{error.status} {error.code}: {error.message}")
                tries.note(replica, refused, now())
                self._log(replica, refused, request.id, correlation_id)
            finally:
                lease.release()
        if tries.error is None:
            raise self._exhausted(tries)
        self._metrics.lost.inc()
        yield tries.error

    def _moved_on(self, tries: Tries, now: float) -> None:
        if tries.going_on and tries.lost_at is not None:
            self._metrics.resume_gap.observe(now - tries.lost_at)
        tries.moved_on()

    def _leaves(self, replica: Replica, tries: Tries) -> bool:
        """Whether a try ends since its replica's time to drain is over and there is another to go on."""
        deadline = replica.drain_deadline
        if deadline is None or asyncio.get_running_loop().time() < deadline:
            return False
        return tries.movable and self.pool.has_another(replica)

    async def _next(self, tries: Tries, ask: Ask) -> Replica | None:
        """The replica of the next try; None: there is none."""
        if tries.error is not None:
            return None
        if tries.resuming:
            return await self._successor(tries, ask)
        if len(tries.tried) >= self._limits.max_tries:
            return None
        replica = await self._choose(tries.tried, ask)
        if replica is None or tries.fault is None:
            return replica
        return await self._retry(replica, tries, ask)

    async def _retry(self, replica: Replica, tries: Tries, ask: Ask) -> Replica | None:
        """`replica` or another, once the budget allows it."""
        reason = "" if tries.fault is None else tries.fault.reason
        pause = self.pool.retry_pause(reason, len(tries.tried) - 1)
        if pause is None:
            return None
        chosen: Replica | None = replica
        if pause:
            await asyncio.sleep(pause)
            chosen = self.pool.choose(tries.tried, ask)
        self._metrics.retried(reason)
        return chosen

    async def _choose(self, tried: list[Replica], ask: Ask) -> Replica | None:
        replica = self.pool.choose(tried, ask)
        if replica is None and not tried:
            # Where only room is missing the answer is 429 at once: the client's pause is worth more than the router's.
            if self.pool.lacks_room(tried):
                return None
            await self.pool.wait(self._limits.no_replica_wait_s)
            replica = self.pool.choose(tried, ask)
        return replica

    async def _successor(self, tries: Tries, ask: Ask) -> Replica | None:
        """The replica that goes on with an answer. Waits for one, within bounds."""
        now = asyncio.get_running_loop().time
        reason = "" if tries.fault is None else tries.fault.reason
        while left := tries.left(now()):
            replica = self.pool.choose_successor(tries.tried, ask)
            if replica is not None:
                (self._metrics.resumed if tries.going_on else self._metrics.retried)(reason)
                return replica
            if tries.tried:
                # Whoever failed since the last token may be well again.
                await asyncio.sleep(min(backoff_s(tries.rounds, random.random()), left))  # noqa: S311 - not a secret
                tries.again()
            else:
                await self.pool.change()
        return None

    def _log(self, replica: Replica, fault: WorkerFault, request_id: str, correlation_id: str) -> None:
        fields = {
            "replica": replica.endpoint.name,
            "reason": fault.reason,
            "detail": str(fault),
            "request_id": request_id,
            "correlation_id": correlation_id,
        }
        log.warning("try failed", extra={"fields": fields})

    def _exhausted(self, tries: Tries) -> ApiError:
        if tries.full is not None:
            return tries.full.refusal
        if self.pool.lacks_room(tries.tried):
            self._metrics.bulkhead_refusals.inc()
            return ApiError(429, "replicas_busy", "Every replica has as many requests as it may have.", retry_after_s=1)
        if tries.fault is None:
            return ApiError(503, "no_replica", "No replica of the model is ready.", retry_after_s=2)
        return ApiError(503, "no_replica", "No replica could answer; the last one failed.", retry_after_s=1)
