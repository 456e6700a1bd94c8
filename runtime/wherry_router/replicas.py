"""The backend that spreads requests over replicas and hides one's failure while the client has seen no token of it."""

import asyncio
import logging
from collections.abc import AsyncGenerator
from contextlib import aclosing

import msgspec

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import ErrorEvent, Event, ExecuteRequest, Token
from wherry_router.metrics import RouterMetrics
from wherry_router.pool import Lease, Pool, Replica
from wherry_router.settings import Limits
from wherry_router.upstream import QueueFull, Upstream, WorkerFault

log = logging.getLogger("wherry.router")

_encode = msgspec.json.Encoder().encode
_BYTES_PER_TOKEN = 4
_PROBE_EVERY_S = 0.5


class Replicas:
    """A `Backend` over the pool."""

    def __init__(self, upstream: Upstream, limits: Limits, metrics: RouterMetrics) -> None:
        self.pool = Pool(on_suspect=self._watch_suspect)
        self._upstream = upstream
        self._limits = limits
        self._metrics = metrics
        self._probes: set[asyncio.Task[None]] = set()
        metrics.outstanding.set_function(lambda: sum(r.outstanding_tokens for r in self.pool.replicas()))
        metrics.replicas.labels("routable").set_function(lambda: sum(not r.suspect for r in self.pool.replicas()))
        metrics.replicas.labels("suspect").set_function(lambda: sum(r.suspect for r in self.pool.replicas()))

    def unready(self) -> str | None:
        """A router is ready once it knows which replicas there are, even if there are none."""
        return None if self.pool.known else "the replicas are not known yet"

    async def close(self) -> None:
        """Ends the probes."""
        for probe in self._probes:
            probe.cancel()
        await asyncio.gather(*self._probes, return_exceptions=True)

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
            replica = await self._choose(tried)
            if replica is None:
                break
            if fault is not None:
                self._metrics.retried(fault.reason)
            tried.append(replica)
            emitted = False
            lease = Lease(replica, len(body) // _BYTES_PER_TOKEN, request.sampling.max_tokens)
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
                self._note(replica, fault, request.id, correlation_id)
            finally:
                lease.release()
            if emitted and not replayable:
                self._metrics.lost.inc()
                yield ErrorEvent(code="worker_lost", message="The replica that was answering is gone.", retryable=True)
                return
        raise _exhausted(fault, full)

    async def _choose(self, tried: list[Replica]) -> Replica | None:
        replica = self.pool.choose(tried)
        if replica is None and not tried:
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
        if fault.suspect:
            self.pool.mark_suspect(replica)

    def _watch_suspect(self, replica: Replica) -> None:
        probe = asyncio.get_running_loop().create_task(self._until_well(replica))
        self._probes.add(probe)
        probe.add_done_callback(self._probes.discard)

    async def _until_well(self, replica: Replica) -> None:
        """Asks a suspect until it is ready again or discovery drops it."""
        while self.pool.has(replica):
            if await self._upstream.ask(replica.endpoint.url, "/ready"):
                replica.suspect = False
                log.info("replica is well again", extra={"fields": {"replica": replica.endpoint.name}})
                return
            await asyncio.sleep(_PROBE_EVERY_S)


def _exhausted(fault: WorkerFault | None, full: QueueFull | None) -> ApiError:
    if full is not None:
        return full.refusal
    if fault is None:
        return ApiError(503, "no_replica", "No replica of the model is ready.", retry_after_s=2)
    return ApiError(503, "no_replica", "No replica could answer; the last one failed.", retry_after_s=1)
