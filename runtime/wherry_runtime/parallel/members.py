"""Who is in the group: its first rank starts the others of its pod, and lets in those of other pods.

A group forms once. When a rank is lost the first one's process ends, and with it the epoch: the kubelet starts the
containers again, and the ranks meet anew.
"""

import contextlib
import hmac
import logging
import os
import secrets
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from typing import NoReturn, TypeVar

from wherry_protocol.engine_config import EngineConfig, to_args
from wherry_protocol.http.auth import is_loopback
from wherry_protocol.naming import GROUP_PORT
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.parallel.group import (
    ENV_LINK,
    ENV_MEMORY,
    ENV_PARENT,
    ENV_RANK,
    Place,
    listen,
    secret,
    settings_digest,
)
from wherry_runtime.parallel.peer import Lost, Peer
from wherry_runtime.parallel.shard import Shard
from wherry_runtime.parallel.wire import (
    Challenge,
    Handshake,
    Hello,
    Link,
    Message,
    Proof,
    Refused,
    Stop,
    Welcome,
    WireError,
    leader_mac,
    rank_mac,
)

log = logging.getLogger(__name__)

FORM_S = 600.0  # for pods to be scheduled, images pulled, checkpoints read
HANDSHAKE_S = 5.0
NONCE = 32
H = TypeVar("H", bound=Handshake)
M = TypeVar("M", bound=Message)


class Child:
    """A rank that this process started, and that ends with it.

    Args:
        descriptors: what it inherits, by the variable that tells it so.
    """

    def __init__(self, rank: int, config: EngineConfig, descriptors: Mapping[str, int], lost: Lost) -> None:
        self.rank = rank
        self._lost = lost
        self._ending = False
        self._started = threading.Event()
        # It is killed when the thread that started it ends, so that has to be one that stays.
        arguments = (config, descriptors)
        threading.Thread(target=self._run, args=arguments, name=f"wherry-rank-{rank}", daemon=True).start()
        self._started.wait()

    @property
    def pid(self) -> int:
        return self._process.pid

    def _run(self, config: EngineConfig, descriptors: Mapping[str, int]) -> None:
        command = [sys.executable, "-m", "wherry_runtime.parallel", *to_args(config)]
        environment = {**os.environ, ENV_RANK: str(self.rank), ENV_PARENT: str(os.getpid())}
        environment |= {name: str(descriptor) for name, descriptor in descriptors.items()}
        passed = list(descriptors.values())
        self._process = subprocess.Popen(command, env=environment, pass_fds=passed, stdin=subprocess.DEVNULL)
        self._started.set()
        status = self._process.wait()
        if not self._ending:
            how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
            self._lost(f"rank {self.rank} {how}")

    def end(self, timeout_s: float = 5.0) -> None:
        """Waits for it to end, and ends it."""
        self._ending = True
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class Members:
    """The group's other ranks, as the first one has them.

    Args:
        lost: called once, from any thread, when the group cannot go on: with the reason.
        memory: descriptor of what the ranks share, where they do.
    """

    def __init__(
        self,
        place: Place,
        config: EngineConfig,
        lost: Lost,
        memory: int | None = None,
    ) -> None:
        self._place = place
        self._config = config
        self._lost = lost
        self._memory = memory
        self._peers: dict[int, Peer] = {}
        self._children: list[Child] = []
        self._joined = threading.Condition()
        self._listening: socket.socket | None = None
        self.epoch = time.time_ns()

    def form(self) -> None:
        """Starts this pod's ranks and lets the others in; returns at once. `wait` says when all are there."""
        if self._place.leader is not None:
            address = self._place.leader
            if not secret() and not is_loopback(address):
                raise ModelError("bad_setting", "ranks in several pods need a worker token to know one another by")
            self._listening = listen(address, GROUP_PORT)
            threading.Thread(target=self._accept, name="wherry-group-accept", daemon=True).start()
        for shard in self._place.beside():
            self._start(shard)

    def _start(self, shard: Shard) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            descriptors = {ENV_LINK: theirs.fileno()}
            if self._memory is not None:
                descriptors[ENV_MEMORY] = self._memory
            self._children.append(Child(shard.rank, self._config, descriptors, self._lost))
        self._join(shard.rank, Link(ours))

    def _join(self, rank: int, link: Link) -> None:
        with self._joined:
            self._peers[rank] = Peer(f"rank {rank}", link, self._lost)
            self._joined.notify_all()

    def wait(self, timeout_s: float = FORM_S) -> None:
        """Until every rank has joined.

        Raises:
            ModelError: rank_missing.
        """
        size = self._place.shard.size
        with self._joined:
            if not self._joined.wait_for(lambda: len(self._peers) == size - 1, timeout_s):
                missing = ", ".join(str(r) for r in range(1, size) if r not in self._peers)
                raise ModelError("rank_missing", f"ranks {missing} did not join within {timeout_s:.0f} s")

    def _accept(self) -> None:
        listening = self._listening
        while listening is not None:
            try:
                sock, address = listening.accept()
            except OSError:
                return  # closed
            threading.Thread(target=self._admit, args=(sock, address[0]), daemon=True).start()

    def _admit(self, sock: socket.socket, address: str) -> None:
        sock.settimeout(HANDSHAKE_S)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        link = Link(sock)
        try:
            hello = expect(link.handshake(), Hello)
            nonce = secrets.token_bytes(NONCE)
            link.send(Challenge(self.epoch, nonce, leader_mac(secret(), hello, self.epoch, nonce)))
            mac = rank_mac(secret(), hello, self.epoch, nonce)
            if not hmac.compare_digest(expect(link.handshake(), Proof).mac, mac):
                refuse(link, "it does not know the worker token")
            if reason := self._why_not(hello):
                refuse(link, reason)
            link.send(Welcome(self.epoch))
            link.trust()
            self._join(hello.rank, link)
            log.info("rank joined", extra={"fields": {"rank": hello.rank, "address": address, "epoch": self.epoch}})
        except WireError as e:
            log.warning("connection refused", extra={"fields": {"address": address, "reason": str(e)}})
            link.close()

    def _why_not(self, hello: Hello) -> str | None:
        place = self._place
        if hello.group != place.key:
            return "it is of another group"
        if hello.size != place.shard.size or not place.per_pod <= hello.rank < hello.size:
            return f"there is no rank {hello.rank} of {hello.size} here"
        if hello.settings != settings_digest(self._config):
            return "its settings or version differ from the leader's"
        with self._joined:
            if hello.rank in self._peers:
                return f"rank {hello.rank} is there already; this epoch has begun without it"
        return None

    def send(self, message: Message) -> None:
        """To every rank, in the order of the calls."""
        for rank in range(1, self._place.shard.size):
            self._peers[rank].send(message)

    def collect(self, kind: type[M], timeout_s: float = FORM_S) -> list[M]:
        """One message from each rank.

        Raises:
            ModelError: what a rank says instead.
        """
        return [self._peers[rank].wait_for(kind, timeout_s) for rank in sorted(self._peers)]

    def loaded(self) -> None:
        """From now on no rank may be silent."""
        for peer in self._peers.values():
            peer.loaded()

    @property
    def pids(self) -> dict[int, int]:
        """Process ids of the ranks that this process started."""
        return {child.rank: child.pid for child in self._children}

    def close(self) -> None:
        """Ends the group as it should."""
        if self._listening is not None:
            self._listening.close()
        for peer in self._peers.values():
            with contextlib.suppress(WireError):  # it is gone already
                peer.link.send(Stop())
            peer.close()
        for child in self._children:
            child.end()


def refuse(link: Link, reason: str) -> NoReturn:
    """Tells a rank why it may not join.

    Raises:
        WireError: the same.
    """
    link.send(Refused(reason))
    raise WireError(reason)


def expect(message: Handshake, kind: type[H]) -> H:
    """The message, if it is of that kind.

    Raises:
        WireError: it is another.
    """
    if not isinstance(message, kind):
        raise WireError(f"{type(message).__name__} where {kind.__name__} is due")
    return message
