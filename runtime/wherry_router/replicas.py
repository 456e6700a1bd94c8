"""The backend that spreads requests over replicas and hides one's failure while the client has seen no token of it."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.router_report import ReplicaReport
from wherry_protocol.worker import ErrorEvent, Event, ExecuteRequest, Token
from wherry_router.metrics import RouterMetrics
from wherry_router.pool import Pool, Replica
from wherry_router.resilience.prober import Prober
from wherry_router.settings import Limits
from wherry_router.upstream import QueueFull, Upstream, WorkerFault

log = logging.getLogger("wherry.router")

_encode = msgspec.json.Encoder().encode
_BYTES_PER_TOKEN = 4


class Replicas:
    """A `Backend` over the pool."""

    def __init__(self, upstream: Upstream, limits: Limits, metrics: RouterMetrics) -> None:
        self._prober = Prober(upstream.ask)
        self.pool = Pool(limits, metrics, on_open=lambda replica: self._prober.watch(self.pool, replica))
        self._upstream = upstream
        self._limits = limits
        self._metrics = metrics

    def unready(self) -> str | None:
        """A router is ready once it knows which replicas there are, even if there are none."""
        return None if self.pool.known else "the replicas are not known yet"

    async def close(self) -> None:
        """Ends the probes."""
        await self._prober.close()

    def report(self) -> list[ReplicaReport]:
        """What the operator is told of each replica."""
        return self.pool.report()

    async def generate(
        self, request: ExecuteRequest, correlation_id: str, *, replayable: bool
    ) -> AsyncGenerator[Event, None]:
        """See `Backend.generate`. Each replica is tried once at most."""
        body = _encode(request)
        deadline = asyncio.get_running_loop().time() + self._limits.first_token_timeout_s
        tried: list[Replica] = []
        fault: WorkerFault | None = None
        full: QueueFull | None = None
        while len(tried) < self._limits.max_tries:
            replica = await self._next(tried, fault)
            if replica is None:
                break
            tried.append(replica)
            emitted = False
            lease = self.pool.lease(replica, len(body) // _BYTES_PER_TOKEN, request.sampling.max_tokens)
            try:
                async with aclosing(self._upstream.execute(replica, body, correlation_id, deadline)) as events:
                    async for event in events:
                        lease.observe(event)
                        if type(event) is Token:
                            emitted = True
                        elif type(event) is ErrorEvent and event.retryable and (replayable or not emitted):
                            raise WorkerFault("worker_error", event.message, suspect=False)  # noqa: TRY301
                        yield event
                return  # noqa: TRY300
            except WorkerFault as error:
                fault = error
                full = error if isinstance(error, QueueFull) else full
                lease.failed(fault.reason)
                self._note(replica, fault, request.id, correlation_id)
            finally:
                lease.release()
            if emitted and not replayable:
                self._metrics.lost.inc()
                yield ErrorEvent(code="worker_lost", message="The replica that was answering is gone.", retryable=True)
                return
        raise self._exhausted(fault, full, tried)

    async def _next(self, tried: list[Replica], fault: WorkerFault | None) -> Replica | None:
        """The replica of the next try; None: there is none, or the budget allows no retry."""
        replica = await self._choose(tried)
        if replica is None or fault is None:
            return replica
        pause = self.pool.retry_pause(fault.reason, len(tried) - 1)
        if pause is None:
            return None
        if pause:
            await asyncio.sleep(pause)
            replica = self.pool.choose(tried)
        self._metrics.retried(fault.reason)
        return replica

    async def _choose(self, tried: list[Replica]) -> Replica | None:
        replica = self.pool.choose(tried)
        if replica is None and not tried:
            # Where only room is missing the answer is 429 at once: the client's pause is worth more than the router's.
            if self.pool.lacks_room(tried):
                return None
            await self.pool.wait(self._limits.no_replica_wait_s)
            replica = self.pool.choose(tried)
        return replica

    def _note(self, replica: Replica, fault: WorkerFault, request_id: str, correlation_id: str) -> None:
        fields = {
            "replica": replica.endpoint.name,
            "reason": fault.reason,
            "detail": str(fault),
            "request_id": request_id,
            "correlation_id": correlation_id,
        }
        log.warning("try failed", extra={"fields": fields})

    def _exhausted(self, fault: WorkerFault | None, full: QueueFull | None, tried: list[Replica]) -> ApiError:
        if full is not None:
            return full.refusal
        if self.pool.lacks_room(tried):
            self._metrics.bulkhead_refusals.inc()
            return ApiError(429, "replicas_busy", "Every replica has as many requests as it may have.", retry_after_s=1)
        if fault is None:
            return ApiError(503, "no_replica", "No replica of the model is ready.", retry_after_s=2)
        return ApiError(503, "no_replica", "No replica could answer; the last one failed.", retry_after_s=1)
