"""`GET /load/watch`: an engine's load, told whenever it has changed, so that no reader knows an old one."""

import asyncio
import time
from collections.abc import Callable

import msgspec

from wherry_protocol.http.asgi import Send
from wherry_protocol.sse import HEARTBEAT, HEARTBEAT_S, encode_load
from wherry_protocol.worker import LoadReport, LoadUpdate
from wherry_runtime.scheduling.digest import Cursor
from wherry_runtime.server.surface import Engine

# With what the way takes, no report is older than 100 ms when the next one comes.
EVERY_S = 0.08


class LoadChanges:
    """What one reader has not been told yet."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._cursor: Cursor | None = None
        self._told: LoadReport | None = None

    def take(self) -> LoadUpdate | None:
        """The next update; None: nothing changed."""
        load = self._engine.load()
        self._cursor, prefixes = self._engine.prefixes_since(self._cursor)
        # The heartbeat's age always changes, and an idle engine has nothing to tell.
        lasting = msgspec.structs.replace(load, heartbeat_age_s=0.0)
        if lasting == self._told and prefixes is None:
            return None
        self._told = lasting
        return LoadUpdate(load=load, prefixes=prefixes)


async def watch_load(engine: Engine, goes_on: Callable[[], bool], send: Send) -> None:
    """Writes events for as long as `goes_on` says, and a comment where there is nothing to tell for `HEARTBEAT_S`.

    A slow reader gets fewer of them, and none is out of date: each is made when the one before has gone out.
    """
    changes = LoadChanges(engine)
    last = 0.0
    while goes_on():
        update = changes.take()
        now = time.monotonic()
        if update is not None or now - last >= HEARTBEAT_S:
            last = now
            body = HEARTBEAT if update is None else encode_load(update)
            await send({"type": "http.response.body", "body": body, "more_body": True})
        await asyncio.sleep(EVERY_S)
    await send({"type": "http.response.body", "body": b""})
