"""The first rank of a pod that does not lead its group, behind the worker API: alive, ready, and refusing requests."""

import asyncio
import threading
from collections.abc import AsyncIterator, Awaitable, Callable

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.naming import EXIT_PEER_LOST
from wherry_protocol.worker import Event, ExecuteRequest, LoadReport, PrefixChange
from wherry_runtime.engine.validation import RequestError
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.locate import with_local_models
from wherry_runtime.parallel.ending import end
from wherry_runtime.parallel.follow import Follower
from wherry_runtime.parallel.group import place
from wherry_runtime.parallel.members import Child
from wherry_runtime.scheduling.digest import Cursor
from wherry_runtime.server.surface import Rounded
from wherry_runtime.sources.progress import Download


class RankEngine:
    """An `Engine` that computes what its group's leader says, and starts the pod's other ranks."""

    def __init__(self, config: EngineConfig, download: Download | None = None) -> None:
        self._config = config
        self._download = download
        self._place = place(config)
        self._serving = False
        self._problem: str | None = None
        self._follower: Follower | None = None
        self._children: list[Child] = []

    def _lost(self, what: str) -> None:
        if self._serving:
            end(f"{EXIT_PEER_LOST}: {what}")
        self._problem = self._problem or what

    async def start(self) -> None:
        """Downloads the model unless it is here, joins the group and loads this rank's part.

        Raises:
            ModelError: why not.
        """
        config = await asyncio.to_thread(with_local_models, self._config, self._download)
        follower = self._follower = Follower(config, self._place, self._lost)
        for shard in self._place.beside():
            self._children.append(Child(shard.rank, config, {}, self._lost))
        await asyncio.to_thread(follower.start)
        self._serving = True
        if self._problem is not None:
            raise ModelError("rank_failed", self._problem)
        threading.Thread(target=self._follow, args=(follower,), name="wherry-rank", daemon=True).start()

    def _follow(self, follower: Follower) -> None:
        try:
            follower.follow()
        except Exception as e:
            end(f"step_failed: {type(e).__name__}: {e}")
        if self._serving:  # not by this process's own will
            end(f"{EXIT_PEER_LOST}: the leader has stopped")

    @property
    def rounded(self) -> Rounded | None:
        """The leader's model is measured."""
        return None

    @property
    def max_model_len(self) -> int:
        return self._config.max_model_len

    async def generate(
        self, request: ExecuteRequest, admitted: Callable[[], Awaitable[None]] | None = None
    ) -> AsyncIterator[Event]:
        """Refuses.

        Raises:
            RequestError: always.
        """
        rank = self._place.shard.rank
        message = f"this is rank {rank} of a group; its leader takes the requests"
        raise RequestError("not_leader", message, status=503, retryable=True)
        yield  # a generator, like every engine's

    def cancel(self, request_id: str) -> bool:
        return False

    def load(self) -> LoadReport:
        """Nothing: the leader's says it all."""
        return LoadReport(
            model=self._config.model_name,
            ready=False,
            running=0,
            waiting=0,
            max_running=0,
            kv_tokens_used=0,
            kv_tokens_total=0,
            prompt_tokens_total=0,
            completion_tokens_total=0,
            prefix_hit_tokens_total=0,
            preemptions_total=0,
            steps_total=0,
            heartbeat_age_s=self.heartbeat_age(),
        )

    def prefixes_since(self, cursor: Cursor | None) -> tuple[Cursor | None, PrefixChange | None]:
        return None, None

    def heartbeat_age(self) -> float:
        return self._follower.step_age() if self._follower is not None else 0.0

    def bound(self) -> bool:
        """The leader may have requests, and ends this process when it stops."""
        return self._serving

    async def close(self) -> None:
        """Leaves the group, which cannot go on without this rank."""
        self._serving = False
        if self._follower is not None:
            self._follower.close()
        await asyncio.gather(*(asyncio.to_thread(child.end) for child in self._children))
