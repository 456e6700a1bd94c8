"""A rank that is led: it joins, loads its part, and computes what the leader says."""

import logging
import os
import secrets
import socket
import time
from collections.abc import Callable

import torch

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.naming import GROUP_PORT
from wherry_runtime.engine.part import Outline, Part
from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.engine.runner import Model, ModelRunner
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.parallel.group import ENV_LINK, ENV_MEMORY, Place, secret, settings_digest
from wherry_runtime.parallel.members import FORM_S, HANDSHAKE_S, NONCE, expect
from wherry_runtime.parallel.model import steps_of
from wherry_runtime.parallel.peer import Lost, Peer
from wherry_runtime.parallel.wire import (
    Build,
    Built,
    Challenge,
    Fault,
    Go,
    Hello,
    Link,
    Loaded,
    Measure,
    Prepare,
    Proof,
    Refused,
    Room,
    Scrub,
    Stop,
    Welcome,
    WireError,
    leader_mac,
    rank_mac,
)
from wherry_runtime.scheduling.plan import UNKNOWN

log = logging.getLogger(__name__)

RETRY_S = 0.25


class RefusedError(ModelError):
    """The leader does not want this rank: it is of another group or epoch."""


class Follower:
    """One rank.

    Args:
        lost: called once, from any thread, when the leader is gone.
    """

    def __init__(self, config: EngineConfig, place: Place, lost: Lost) -> None:
        self._config = config
        self._place = place
        self._lost = lost
        self._began: float | None = None  # the step that is being computed
        self._prepared: dict[int, Prepared] = {}
        self._peer: Peer | None = None
        self._runner: ModelRunner | None = None

    def start(self) -> None:
        """Joins, loads and builds.

        Raises:
            ModelError: why not; the leader was told.
        """
        link = _inherited() or join_leader(self._config, self._place)
        peer = self._peer = Peer("the leader", link, self._lost)
        try:
            part = Outline.of(self._config, self._place).load()
            self._runner = ModelRunner(self._build(peer, part))
        except Exception as e:
            code = e.code if isinstance(e, ModelError) else type(e).__name__
            peer.send(Fault(code, str(e)))
            raise
        peer.loaded()
        peer.send(Built())

    def _build(self, peer: Peer, part: Part) -> Model:
        peer.send(Loaded())
        peer.wait_for(Measure, FORM_S)
        peer.send(Room(part.num_blocks()))
        build = peer.wait_for(Build, FORM_S)
        memory = os.environ.get(ENV_MEMORY)
        return part.build(build.num_blocks, int(memory) if memory else None, build.store)

    def follow(self) -> None:
        """Computes steps until the leader stops. Blocks.

        Raises:
            Exception: a step failed; the leader was told.
        """
        peer, runner = self._peer, self._runner
        if peer is None or runner is None:
            raise RuntimeError("the rank was not started")
        while (message := peer.receive()) is not None:
            if isinstance(message, Stop):
                break
            try:
                self._obey(runner, message)
            except Exception as e:
                peer.send(Fault("step_failed", f"{type(e).__name__}: {e}"))
                raise
        peer.close()

    def _obey(self, runner: ModelRunner, message: object) -> None:
        if isinstance(message, Prepare):
            self._prepared[message.step] = runner.prepare(steps_of(message))
        elif isinstance(message, Go):
            for number in [n for n in self._prepared if n < message.step]:
                del self._prepared[number]
            self._began = time.monotonic()
            compute(runner, self._prepared.pop(message.step), message.tokens)
            self._began = None
        elif isinstance(message, Scrub):
            runner.cache.scrub(message.blocks)

    def step_age(self) -> float:
        """Seconds that the step takes which is being computed; 0 between steps."""
        began = self._began
        return 0.0 if began is None else time.monotonic() - began

    def close(self) -> None:
        """Leaves the group."""
        if self._peer is not None:
            self._peer.close()


def compute(runner: ModelRunner, prepared: Prepared, tokens: list[int]) -> None:
    """This rank's part of a step, with `tokens` in the place of UNKNOWN ones."""
    known = iter(tokens)
    for sequence in prepared.sequences:
        if sequence.tokens[-1] == UNKNOWN:
            sequence.tokens[-1] = next(known)
    with torch.inference_mode():
        for _ in runner.model.logits(prepared):
            pass


def _inherited() -> Link | None:
    """The link that the process which started this one made, if one did."""
    descriptor = os.environ.get(ENV_LINK)
    return Link(socket.socket(fileno=int(descriptor))) if descriptor else None


def join_leader(
    config: EngineConfig, place: Place, timeout_s: float = FORM_S, clock: Callable[[], float] = time.monotonic
) -> Link:
    """Joins the group at its leader's address, which may not listen yet.

    Raises:
        RefusedError: the leader is another one, or does not want this rank.
        ModelError: no_leader, if nobody answers.
    """
    deadline = clock() + timeout_s
    address = (place.leader or "", GROUP_PORT)
    while True:
        try:
            sock = socket.create_connection(address, HANDSHAKE_S)
            break
        except OSError as e:
            if clock() >= deadline:
                raise ModelError("no_leader", f"no leader of the group at {address[0]}:{address[1]}: {e}") from e
            time.sleep(RETRY_S)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    link = Link(sock)
    try:
        _handshake(link, config, place)
    except WireError as e:
        link.close()
        raise RefusedError("refused", f"the leader at {address[0]} did not take this rank: {e}") from e
    return link


def _handshake(link: Link, config: EngineConfig, place: Place) -> None:
    shard = place.shard
    hello = Hello(place.key, shard.rank, shard.size, settings_digest(config), secrets.token_bytes(NONCE))
    link.send(hello)
    challenge = expect(link.handshake(), Challenge)
    if not secrets.compare_digest(challenge.mac, leader_mac(secret(), hello, challenge.epoch, challenge.nonce)):
        raise WireError("it does not know the worker token")
    link.send(Proof(rank_mac(secret(), hello, challenge.epoch, challenge.nonce)))
    answer = link.handshake()
    if isinstance(answer, Refused):
        raise WireError(answer.reason)
    welcome = expect(answer, Welcome)
    if welcome.epoch != challenge.epoch:
        raise WireError("it changed its epoch midway")
    link.trust()
