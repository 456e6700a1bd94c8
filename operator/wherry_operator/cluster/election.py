"""Leader election by a Lease, after client-go's (https://kubernetes.io/docs/concepts/architecture/leases/).

The holder's clock is never compared with ours: a lease counts as held as long as its record keeps changing within its
duration, measured here. The leader stops acting `RENEW_DEADLINE_S` after the start of its last renewal, which is before
anybody else may take the lease, so that two operators never act at once.
"""

import asyncio
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from wherry_operator.cluster.client import Api, ApiError, Unavailable, path_of
from wherry_operator.metrics import LEADER

logger = logging.getLogger("wherry.operator")

LEASE_DURATION_S = 15
RENEW_DEADLINE_S = 10.0
RETRY_S = 2.0


class Election:
    """One candidate. `identity` must be unique."""

    def __init__(
        self, api: Api, namespace: str, name: str, identity: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._api = api
        self._namespace, self._name, self._identity = namespace, name, identity
        self._clock = clock
        self._renewed = float("-inf")
        self._seen: tuple[Any, ...] = ()
        self._seen_at = 0.0
        self._released = False

    def leading(self) -> bool:
        """Whether this candidate may act now."""
        return not self._released and self._clock() - self._renewed < RENEW_DEADLINE_S

    async def acquire(self) -> None:
        """Waits until this candidate leads."""
        while True:
            if await self._try():
                break
            await asyncio.sleep(RETRY_S)
        LEADER.set(1)
        logger.info("leading as %s", self._identity)

    async def hold(self) -> None:
        """Renews the lease; returns once it is lost."""
        while self.leading():
            await asyncio.sleep(RETRY_S)
            await self._try()
        LEADER.set(0)

    async def release(self) -> None:
        """Gives the lease up, so that another candidate need not wait for its end."""
        if not self.leading():
            return
        try:
            lease = await self._api.get("Lease", self._namespace, self._name)
            self._released = True
            LEADER.set(0)
            if lease and lease["spec"].get("holderIdentity") == self._identity:
                lease["spec"] |= {"holderIdentity": "", "leaseDurationSeconds": 1}
                await self._api.request("PUT", path_of("Lease", self._namespace, self._name), body=lease)
        except (ApiError, Unavailable):
            logger.info("the lease could not be given up; it ends by itself")

    async def _try(self) -> bool:
        begun = self._clock()
        try:
            # A request that hangs must not eat the whole deadline.
            async with asyncio.timeout(RENEW_DEADLINE_S / 2):
                taken = await self._take()
        except (ApiError, Unavailable, TimeoutError) as error:
            logger.warning("lease %s/%s: %s", self._namespace, self._name, error or "no answer")
            return False
        if taken:
            self._renewed = begun
        return taken

    async def _take(self) -> bool:
        lease = await self._api.get("Lease", self._namespace, self._name)
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        if lease is None:
            body = {"apiVersion": "coordination.k8s.io/v1", "kind": "Lease", "metadata": {"name": self._name}}
            body["spec"] = self._record(stamp, stamp, 0)
            await self._api.request("POST", path_of("Lease", self._namespace), body=body)
            return True
        spec = lease.get("spec", {})
        record = (spec.get("holderIdentity"), spec.get("renewTime"), spec.get("leaseTransitions"))
        if record != self._seen:
            self._seen, self._seen_at = record, self._clock()
        holder = spec.get("holderIdentity")
        ours = holder == self._identity
        fresh = self._clock() - self._seen_at < spec.get("leaseDurationSeconds", LEASE_DURATION_S)
        if holder and not ours and fresh:
            return False
        since = spec.get("acquireTime", stamp) if ours else stamp
        turns = spec.get("leaseTransitions", 0) + (0 if ours else 1)
        lease["spec"] = self._record(since, stamp, turns)
        # The resource version in the body makes this fail if anyone else was faster.
        await self._api.request("PUT", path_of("Lease", self._namespace, self._name), body=lease)
        return True

    def _record(self, since: str, stamp: str, turns: int) -> dict[str, Any]:
        return {
            "holderIdentity": self._identity,
            "leaseDurationSeconds": LEASE_DURATION_S,
            "acquireTime": since,
            "renewTime": stamp,
            "leaseTransitions": turns,
        }
