"""The group from its first rank: formed, loaded, built and led."""

import logging
import os
import socket
import threading
from typing import Any

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.naming import EXIT_PEER_LOST
from wherry_runtime.engine.part import Outline, Part
from wherry_runtime.engine.runner import Model
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.parallel.ending import end
from wherry_runtime.parallel.group import Place
from wherry_runtime.parallel.members import Members
from wherry_runtime.parallel.model import ParallelModel
from wherry_runtime.parallel.wire import Build, Built, Loaded, Measure, Room

log = logging.getLogger(__name__)


class Leader:
    """The first rank's view of its group.

    Until the group serves, what happens to a rank makes `build` fail; from then on it ends this process, since a step
    that some ranks have begun cannot be finished or taken back.
    """

    def __init__(self, place: Place, config: EngineConfig, memory: int | None) -> None:
        self._memory = memory
        self._size = place.shard.size
        self._serving = False
        self._problem = ""
        self._lock = threading.Lock()
        self._store: Any = None
        self._meet: tuple[str, int] | None = None
        if memory is None:
            from wherry_runtime.parallel.distributed import host

            listening = socket.create_server((place.leader or "127.0.0.1", 0))
            self._meet = listening.getsockname()[:2]
            self._store = host(listening, self._size)
        self.members = Members(place, config, self._lost, memory)

    def _lost(self, what: str) -> None:
        with self._lock:
            self._problem = self._problem or what
            serving = self._serving
        log.error("rank lost", extra={"fields": {"reason": what, "epoch": self.members.epoch}})
        if serving:
            end(f"{EXIT_PEER_LOST}: {what}")

    def build(self, part: Part, beside: int) -> tuple[int, Model]:
        """Builds every rank's model, once all have loaded theirs.

        Returns:
            how many KV cache blocks there are, and a model that computes on all ranks.

        Raises:
            ModelError: what kept a rank from it.
        """
        members = self.members
        try:
            members.wait()
            members.collect(Loaded)
            members.send(Measure())
            room = [message.num_blocks for message in members.collect(Room)]
            num_blocks = min(part.num_blocks(beside), *room)
            members.send(Build(num_blocks, self._meet))
            own = part.build(num_blocks, self._memory, self._meet)
            members.collect(Built)
        except ModelError as e:
            if e.code == "rank_failed" and self._problem:
                raise ModelError(e.code, self._problem) from e
            raise
        members.loaded()
        with self._lock:
            self._serving = True
            problem = self._problem
        if problem:
            raise ModelError("rank_failed", problem)
        log.info("the group is complete", extra={"fields": {"ranks": self._size, "epoch": members.epoch}})
        return num_blocks, ParallelModel(own, members.send, end)

    def close(self) -> None:
        """Ends the other ranks."""
        with self._lock:
            self._serving = False
        self.members.close()
        if self._memory is not None:
            os.close(self._memory)
            self._memory = None


def lead(outline: Outline) -> Leader:
    """Begins to form the group.

    Raises:
        ModelError: it cannot be formed like this.
    """
    place = outline.place
    if not place.shard.first:
        raise ModelError("bad_setting", f"rank {place.shard.rank} does not lead its group")
    leader = Leader(place, outline.config, outline.shared_memory())
    leader.members.form()
    return leader
