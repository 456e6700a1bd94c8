"""A worker's life: downloading, loading, ready, draining, gone; or loading, failed."""

import asyncio
import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import msgspec

from wherry_protocol.http.server import drained
from wherry_runtime.server.drift import Drift, measured
from wherry_runtime.server.surface import Engine
from wherry_runtime.sources.progress import Download

log = logging.getLogger("wherry.worker")

State = Literal["loading", "ready", "draining", "failed"]
ENV_TERMINATION_LOG = "WHERRY_TERMINATION_LOG"
# The longest that one step may take. A loop that has not gone round for longer is hung, whatever HTTP still answers.
MAX_HEARTBEAT_AGE_S = 60.0
EXIT_MODEL = 1


class Lifecycle:
    """The state, and how many requests run.

    Args:
        download: how far the engine is with downloading its model, where it has to.
    """

    def __init__(self, download: Download | None = None) -> None:
        self.download = download or Download()
        self.state: State = "loading"
        self.reason = "Loading"
        self.message = "the model is being loaded"
        self.stop = asyncio.Event()
        self.in_flight = 0
        self.drift: Drift | None = None
        self._loaded = False

    def _enter(self, state: State, reason: str, message: str) -> None:
        self.state, self.reason, self.message = state, reason, message
        log.info("state", extra={"fields": {"state": state, "reason": reason, "detail": message}})

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Counts a request for as long as it runs."""
        self.in_flight += 1
        try:
            yield
        finally:
            self.in_flight -= 1

    def ready(self) -> tuple[int, dict[str, str]]:
        """Status and body of `/ready`."""
        body = {"state": self.state, "reason": self.reason, "message": self.message}
        if self._downloads():
            message = f"the model is being downloaded: {self.download.snapshot()}"
            body = {"state": "downloading", "reason": "Downloading", "message": message}
        return (200 if self.state == "ready" else 503), body

    def health(self, engine: Engine) -> tuple[int, dict[str, object]]:
        """Status and body of `/health`: while loading there is no step loop yet; later its heartbeat decides."""
        if self._downloads():
            at = self.download.snapshot()
            return 200, {"state": "downloading", "download": {"bytes": at.done, "total": at.total, "text": str(at)}}
        if not self._loaded:
            return 200, {"state": self.state}
        age = engine.heartbeat_age()
        body: dict[str, object] = {"state": self.state, "heartbeat_age_s": age}
        if self.drift is not None:
            body["quality"] = self.drift
        return (200 if age < MAX_HEARTBEAT_AGE_S else 503), body

    def _downloads(self) -> bool:
        return self.state == "loading" and self.download.active

    async def load(self, engine: Engine) -> bool:
        """Loads the model. False: it cannot be loaded; the reason went to the termination log and to stderr."""
        try:
            await engine.start()
        except Exception as error:
            code = getattr(error, "code", None)
            if code is None:
                log.exception("loading failed")
            reason = str(code or type(error).__name__)
            message = str(getattr(error, "message", None) or error)
            self._enter("failed", reason, message)
            tell_why(f"{reason}: {message}")
            return False
        self._loaded = True
        if self.state == "loading":
            self._enter("ready", "Ready", "")
        return True

    async def measure(self, engine: Engine) -> None:
        """Measures what rounding cost the model, for `/health` to tell. Answers go first."""
        if (model := engine.rounded) is None:
            return
        from wherry_runtime.engine.resources import available_memory  # which is there by now, with torch

        # What the KV cache and the weights will take is spoken for only in part by now: the rest is left to them.
        self.drift = await measured(model, await asyncio.to_thread(available_memory) // 2)
        log.info("quality", extra={"fields": {"quality": msgspec.to_builtins(self.drift)}})

    async def drain(self, timeout_s: float, engine: Engine) -> None:
        """Takes no more requests and waits for the running ones, and until nobody depends on `engine`, `timeout_s` at
        most."""
        if self.state == "failed":
            return
        self._enter("draining", "Draining", "the worker is shutting down")
        if not await drained(lambda: self.in_flight + engine.bound(), timeout_s):
            log.warning("drain timed out", extra={"fields": {"cut": self.in_flight, "drain_timeout_s": timeout_s}})


def tell_why(message: str) -> None:
    """Leaves the reason of an exit where Kubernetes looks for it (one line), and on stderr."""
    line = " ".join(message.split())
    sys.stderr.write(f"wherry-runtime: {line}\n")
    path = Path(os.environ.get(ENV_TERMINATION_LOG, "/dev/termination-log"))
    # Kubernetes makes the file; elsewhere /dev must not get a new one.
    if ENV_TERMINATION_LOG in os.environ or path.exists():
        with contextlib.suppress(OSError):
            path.write_text(line[:4000])
