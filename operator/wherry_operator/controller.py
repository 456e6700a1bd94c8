"""The workers: they take keys from the queue, look at each, and put back what has to be looked at again."""

import asyncio
import contextlib
import logging
import time
from collections.abc import Sequence

from wherry_operator.cluster.client import Api, ApiError, LostLeadership, Unavailable
from wherry_operator.cluster.execute import StaleError
from wherry_operator.cluster.queue import WorkQueue
from wherry_operator.cluster.reconcile import Key, Reconciler
from wherry_operator.metrics import RECONCILE_SECONDS, RECONCILES

logger = logging.getLogger("wherry.operator")

WORKERS = 4
# The first look at nodes should be there before the first plan, but nothing waits for it forever.
NODES_TIMEOUT_S = 10.0
# A pass that takes this long hangs; it is given up and tried again.
PASS_TIMEOUT_S = 60.0


class Controller:
    """Runs reconciliations while this operator leads. Events only ever add keys; what happened does not matter."""

    def __init__(self, api: Api, reconciler: Reconciler, namespaces: Sequence[str], resync_s: float) -> None:
        self.queue: WorkQueue[Key] = WorkQueue()
        self._api = api
        self._reconciler = reconciler
        self._namespaces: Sequence[str | None] = namespaces or [None]
        self._resync_s = resync_s
        reconciler.prober.changed = self.queue.add

    async def run(self) -> None:
        """Works until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._reconciler.nodes.run())
            group.create_task(self._reconciler.prober.run())
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._reconciler.nodes.known.wait(), NODES_TIMEOUT_S)
            group.create_task(self._resync())
            for _ in range(WORKERS):
                group.create_task(self._work())

    async def _resync(self) -> None:
        """Looks at everything now and then, so that a missed event is only ever late."""
        while True:
            try:
                for namespace in self._namespaces:
                    for raw in await self._api.list("LLMDeployment", namespace):
                        self.queue.add(Key(raw["metadata"]["namespace"], raw["metadata"]["name"]))
            except (ApiError, Unavailable) as error:
                logger.warning("cannot list LLMDeployments: %s", error)
                await asyncio.sleep(2.0)
            else:
                await asyncio.sleep(self._resync_s)

    async def _work(self) -> None:
        while True:
            key = await self.queue.get()
            begun = time.monotonic()
            try:
                async with asyncio.timeout(PASS_TIMEOUT_S):
                    again = await self._reconciler.reconcile(key)
            except asyncio.CancelledError:
                # Not leading any more: whoever leads next looks at everything anyway.
                self.queue.done(key)
                raise
            except (StaleError, ApiError, Unavailable, LostLeadership, TimeoutError) as error:
                delay = self.queue.failed(key)
                RECONCILES.labels("requeued").inc()
                logger.info("%s/%s: again in %.1f s: %s", key.namespace, key.name, delay, error or "timed out")
            except Exception:
                delay = self.queue.failed(key)
                RECONCILES.labels("error").inc()
                logger.exception("%s/%s: a fault of the operator; again in %.1f s", key.namespace, key.name, delay)
            else:
                self.queue.done(key)
                RECONCILES.labels("ok").inc()
                if again is not None:
                    self.queue.add_after(key, again)
            RECONCILE_SECONDS.observe(time.monotonic() - begun)
