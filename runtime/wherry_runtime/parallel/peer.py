"""A peer of the group at the other end of a link: what it says, and whether it is still there."""

import logging
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import TypeVar

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.parallel.wire import Beat, Fault, Link, Message, Stop, WireError

log = logging.getLogger(__name__)

BEAT_S = 0.2
# How many of its beats a peer may miss. They need no more than a moment of a core: a slow step does not look frozen.
# Counted by this process's own beats, so that one that stood still itself blames nobody when it goes on.
MISSED = 5
MISSED_WHILE_LOADING = 300  # reading a checkpoint may keep the interpreter's lock for long

M = TypeVar("M", bound=Message)
Lost = Callable[[str], None]


class Peer:
    """Reads a link in a thread of its own, and beats.

    Args:
        name: for messages, like "rank 1".
        lost: called at most once, from any thread, with what happened: the peer is gone, silent or broken.
    """

    def __init__(self, name: str, link: Link, lost: Lost) -> None:
        self.name = name
        self.link = link
        self._lost = lost
        self._heard = time.monotonic()
        self._missed = 0
        self._patience = MISSED_WHILE_LOADING
        self._messages: SimpleQueue[Message | None] = SimpleQueue()
        self._closed = threading.Event()
        self._once = threading.Lock()
        for work in (self._read, self._watch):
            threading.Thread(target=work, name=f"wherry-{work.__name__[1:]}-{name}", daemon=True).start()

    def loaded(self) -> None:
        """From now on it must not be silent for longer than a moment."""
        self._missed = 0
        self._patience = MISSED

    def send(self, message: Message) -> None:
        """Sends; a connection that is gone is told by `lost`, and here by a WireError."""
        try:
            self.link.send(message)
        except WireError as e:
            self._say(f"{self.name} cannot be reached: {e}")
            raise

    def receive(self) -> Message | None:
        """The next message; None once the link is closed."""
        return self._messages.get()

    def wait_for(self, kind: type[M], timeout_s: float) -> M:
        """The next message, which must be a `kind`.

        Raises:
            ModelError: rank_failed, with what the peer said instead or that it said nothing.
        """
        try:
            message = self._messages.get(timeout=timeout_s)
        except Empty:
            raise ModelError("rank_failed", f"{self.name} was not ready within {timeout_s:.0f} s") from None
        if isinstance(message, Fault):
            raise ModelError(message.code, f"{self.name}: {message.message}")
        if not isinstance(message, kind):
            what = "ended" if message is None else f"said {type(message).__name__}"
            raise ModelError("rank_failed", f"{self.name} {what} before it was ready")
        return message

    def close(self) -> None:
        """Ends the link, on purpose."""
        self._closed.set()
        self.link.close()

    def _say(self, what: str) -> None:
        if not self._closed.is_set() and self._once.acquire(blocking=False):
            self._lost(what)

    def _read(self) -> None:
        try:
            while True:
                message = self.link.receive()
                self._heard, self._missed = time.monotonic(), 0
                if type(message) is Beat:
                    continue
                if type(message) is Stop:
                    self._closed.set()  # the end of the link is no surprise
                self._messages.put(message)
                if type(message) is Fault:
                    self._say(f"{self.name} ended: {message.code}: {message.message}")
        except WireError as e:
            self._messages.put(None)
            self._say(f"{self.name} is gone: {e}")

    def _watch(self) -> None:
        while not self._closed.wait(BEAT_S):
            if self._missed >= self._patience:
                self._say(f"{self.name} was silent for {time.monotonic() - self._heard:.1f} s")
                return
            self._missed += 1
            try:
                self.link.beat()
            except WireError as e:
                self._say(f"{self.name} cannot be reached: {e}")
                return
