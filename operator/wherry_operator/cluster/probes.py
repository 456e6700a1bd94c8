"""Active probes: every second each worker and router is asked whether it is there, and its node where it is silent.

What costs nothing while all is well: a pod that answers says enough about its node. Only where one does not, the
node's kubelet and its Lease are looked at, and a few other nodes to compare with. The verdict is failover.py's.
"""

import asyncio
import logging
import ssl
import time
from collections.abc import Awaitable, Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import aiohttp

from wherry_operator.cluster.asking import url_of
from wherry_operator.cluster.client import Api, ApiError, Unavailable
from wherry_operator.cluster.nodes import KUBELET_PORT, Nodes
from wherry_operator.metrics import ISOLATED, LOST_NODES
from wherry_operator.planning.downloads import progress_of
from wherry_operator.planning.failover import NodeSignal, PodSignal, Verdict, judge
from wherry_operator.planning.pods import PodView, Quality
from wherry_operator.planning.quality import quality_of
from wherry_protocol import naming

logger = logging.getLogger("wherry.operator")
K = TypeVar("K", bound=Hashable)

INTERVAL_S = 1.0
# Above this many pods the interval grows, so that a large fleet costs a fixed share of a core.
PROBES_PER_S = 1000
TIMEOUT_S = 1.0  # for a connection, and for an answer
API_TIMEOUT_S = 2.0
AT_ONCE = 256
MAX_HEALTH = 4096  # bytes of an answer that are looked at
LEASES_AT_ONCE = 8
# How often the kubelet of a node that is well is tried, to know that it can be reached at all.
BASELINE_S = 30.0
# Other nodes that a crisis is compared with.
WITNESSES = 5
# A pause between rounds, or a try, that takes so much longer than it may means that this process was stopped meanwhile.
STALL_S = 3.0
LEASE_NAMESPACE = "kube-node-lease"
# The kubelet renews its Lease four times within its duration.
RENEWALS = 4
DEFAULT_LEASE_S = 40


@dataclass
class _Contact:
    """How the tries to reach something went. Times are those of the prober's clock."""

    silent_since: float | None = None
    reached: bool = False
    tried: float = float("-inf")

    @property
    def answers(self) -> bool:
        return self.reached and self.silent_since is None

    def note(self, begun: float, answered: bool, reached: bool = False) -> None:
        self.tried = begun
        self.reached |= reached or answered
        if answered:
            self.silent_since = None
        elif self.silent_since is None:
            self.silent_since = begun


@dataclass
class _NodeMemory:
    kubelet: _Contact = field(default_factory=_Contact)
    host: str = ""  # from a pod's status, for where nodes may not be read
    lease: str = ""
    lease_since: float | None = None
    renew_interval_s: float = DEFAULT_LEASE_S / RENEWALS


@dataclass(frozen=True)
class _Target(Generic[K]):
    key: K
    pod: PodView
    port: int
    patience_s: float


class Prober(Generic[K]):
    """Watches over the pods that it is told of.

    `verdict` is what the last round came to; `downloads`: how far the pods are that download their model, by uid;
    `qualities`: what rounding cost it, as they measured it.
    """

    def __init__(
        self,
        api: Api,
        nodes: Nodes,
        clock: Callable[[], float] = time.monotonic,
        changed: Callable[[K], None] = lambda _: None,
    ) -> None:
        self._api, self._nodes, self._clock = api, nodes, clock
        self.changed = changed
        self.verdict = Verdict()
        self.downloads: dict[str, str] = {}
        self.qualities: dict[str, Quality] = {}
        self._targets: dict[K, tuple[_Target[K], ...]] = {}
        self._pods: dict[str, _Contact] = {}
        self._memory: dict[str, _NodeMemory] = {}
        self._leases_readable = True
        self._api_answers = True
        self._stalled = False
        self._limit = asyncio.Semaphore(AT_ONCE)
        self._lease_limit = asyncio.Semaphore(LEASES_AT_ONCE)
        # The kubelet's certificate is not checked: nothing is told to it, and who answers is alive.
        self._tls = ssl.create_default_context()
        self._tls.check_hostname = False
        self._tls.verify_mode = ssl.CERT_NONE
        nodes.changed = self._node_changed

    def watch(self, key: K, pods: Sequence[PodView], routers: Sequence[PodView], patience_s: float) -> None:
        """These are the pods of `key` now. Pods that are being deleted count too: they tell about their nodes."""
        workers = [(pod, naming.PROBE_PORT if pod.mutual_tls else naming.WORKER_PORT) for pod in pods]
        ports = workers + [(pod, naming.ROUTER_PORT) for pod in routers]
        bound = [(pod, port) for pod, port in ports if pod.node and not pod.ended]
        self._targets[key] = tuple(_Target(key, pod, port, patience_s) for pod, port in bound)

    def forget(self, key: K) -> None:
        """There is no `key` any more."""
        self._targets.pop(key, None)

    async def run(self) -> None:
        """Probes until cancelled; begins with no memory, as what was seen long ago says nothing."""
        self._pods.clear()
        self._memory.clear()
        self.verdict = Verdict()
        self._leases_readable = self._api_answers = True
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=15)
        timeout = aiohttp.ClientTimeout(total=2 * TIMEOUT_S, sock_connect=TIMEOUT_S, sock_read=TIMEOUT_S)
        ended = self._clock()
        async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
            while True:
                begun = self._clock()
                self._stalled = begun - ended > self._interval() + STALL_S
                await self._round(session)
                ended = self._clock()
                await asyncio.sleep(max(0.0, self._interval() - (ended - begun)))

    def _interval(self) -> float:
        return max(INTERVAL_S, sum(map(len, self._targets.values())) / PROBES_PER_S)

    def _start_over(self) -> None:
        """Silence that this process slept through says nothing about anybody else."""
        logger.warning("the probes stood still for a while; what was silent before is looked at anew")
        for contact in (*self._pods.values(), *(memory.kubelet for memory in self._memory.values())):
            contact.silent_since = None
        for memory in self._memory.values():
            memory.lease_since = None

    async def _round(self, session: aiohttp.ClientSession) -> None:
        targets = [target for group in self._targets.values() for target in group]
        self._remember(targets)
        await _all(self._probe(session, target) for target in targets)
        silent = {target.pod.node for target in targets if self._pods[target.pod.uid].silent_since is not None}
        suspects = silent - {target.pod.node for target in targets if self._pods[target.pod.uid].answers}
        witnesses = self._witnesses(suspects)
        now = self._clock()
        due = {name for name, memory in self._memory.items() if now - memory.kubelet.tried >= BASELINE_S}
        await _all(self._probe_kubelet(name) for name in suspects | due | (set(witnesses) if suspects else set()))
        # A kubelet that answers is on a live node, whatever its Lease says.
        unheard = {name for name in suspects if not self._memory[name].kubelet.answers}
        self._api_answers = True
        await _all(self._read_lease(name) for name in unheard)
        for name in self._memory.keys() - unheard:
            self._memory[name].lease_since = None
        if self._stalled:
            self._start_over()
        self._conclude(targets, witnesses)

    def _remember(self, targets: list[_Target[K]]) -> None:
        """Keeps notes on what is there, and drops those on what is not any more."""
        uids = {target.pod.uid for target in targets}
        self.downloads = {uid: text for uid, text in self.downloads.items() if uid in uids}
        self.qualities = {uid: quality for uid, quality in self.qualities.items() if uid in uids}
        self._pods = {uid: self._pods.get(uid) or _Contact() for uid in uids}
        hosts = {target.pod.node: target.pod.host_ip for target in sorted(targets, key=lambda t: t.pod.host_ip)}
        spare = [name for name in self._nodes.names() if name not in hosts][:WITNESSES]
        self._memory = {name: self._memory.get(name) or _NodeMemory() for name in {*hosts, *spare}}
        for name, host in hosts.items():
            self._memory[name].host = host or self._memory[name].host

    def _witnesses(self, suspects: set[str]) -> list[str]:
        """Nodes to compare the suspects with, besides those whose workers answer."""
        bound = {target.pod.node for targets in self._targets.values() for target in targets}
        return [name for name in self._memory if name not in bound and name not in suspects]

    async def _probe(self, session: aiohttp.ClientSession, target: _Target[K]) -> None:
        pod = target.pod
        async with self._limit:
            begun = self._clock()
            reached, health = await _ask(session, pod, target.port) if pod.ip else (False, None)
            self._note(self._pods[pod.uid], begun, health is not None, reached)
        if health is not None and (text := progress_of(health)) != self.downloads.get(pod.uid, ""):
            self.downloads[pod.uid] = text
            self.changed(target.key)
        if health is not None and (quality := quality_of(health)) not in (None, self.qualities.get(pod.uid)):
            self.qualities[pod.uid] = quality
            self.changed(target.key)

    def _note(self, contact: _Contact, begun: float, answered: bool, reached: bool = False) -> None:
        self._stalled |= self._clock() - begun > 2 * TIMEOUT_S + STALL_S
        contact.note(begun, answered, reached)

    async def _probe_kubelet(self, name: str) -> None:
        memory, facts = self._memory[name], self._nodes.get(name)
        host, port = (facts.address, facts.port) if facts and facts.address else (memory.host, KUBELET_PORT)
        if not host:
            return
        async with self._limit:
            begun = self._clock()
            self._note(memory.kubelet, begun, await self._shakes_hands(host, port))

    async def _shakes_hands(self, host: str, port: int) -> bool:
        """Whether a process, and not just its kernel, takes up a TLS connection."""
        try:
            async with asyncio.timeout(TIMEOUT_S):
                _, writer = await asyncio.open_connection(host, port, ssl=self._tls)
        except ssl.SSLError:
            return True
        except (OSError, TimeoutError):
            return False
        writer.close()
        return True

    async def _read_lease(self, name: str) -> None:
        """Notes when the node's Lease was last seen to change, by this clock: the node's own is not to be trusted."""
        if not self._leases_readable:
            return
        memory = self._memory[name]
        async with self._lease_limit:
            try:
                async with asyncio.timeout(API_TIMEOUT_S):
                    raw = await self._api.get("Lease", LEASE_NAMESPACE, name)
            except ApiError as error:
                self._leases_readable = error.code not in (401, 403)
                return
            except (Unavailable, TimeoutError):
                self._api_answers = False
                return
        spec: dict[str, Any] = (raw or {}).get("spec", {})
        if (renewed := spec.get("renewTime", "")) != memory.lease or memory.lease_since is None:
            memory.lease, memory.lease_since = renewed, self._clock()
        memory.renew_interval_s = spec.get("leaseDurationSeconds", DEFAULT_LEASE_S) / RENEWALS

    def _conclude(self, targets: list[_Target[K]], witnesses: list[str]) -> None:
        pods = []
        for target in targets:
            contact = self._pods[target.pod.uid]
            silent, patience = contact.silent_since, target.patience_s
            pods.append(PodSignal(target.pod.uid, target.pod.node, silent, contact.reached, patience))
        names = sorted({target.pod.node for target in targets} | set(witnesses))
        before, live = self.verdict, self.verdict.live
        self.verdict = judge(pods, [self._signal(name) for name in names], self._clock(), self._api_answers)
        changed = before.lost.keys() ^ self.verdict.lost.keys()
        LOST_NODES.set(len(self.verdict.nodes))
        ISOLATED.set(bool(self.verdict.isolated))
        if before.nodes != self.verdict.nodes and self.verdict.nodes:
            logger.warning("lost nodes: %s", ", ".join(self.verdict.nodes))
        if bool(before.isolated) != bool(self.verdict.isolated):
            logger.warning("isolated: %s", self.verdict.isolated or "not any more")
        back = self.verdict.live - live
        if back or (bool(before.isolated), before.nodes) != (bool(self.verdict.isolated), self.verdict.nodes):
            # Pods that keep off a node that is back may be anyone's, and have no node that would tell.
            keys = set(self._targets)
        else:
            keys = {target.key for target in targets if target.pod.uid in changed}
        for key in keys:
            self.changed(key)

    def _signal(self, name: str) -> NodeSignal:
        memory, facts = self._memory[name], self._nodes.get(name)
        return NodeSignal(
            name=name,
            kubelet_silent_since=memory.kubelet.silent_since,
            kubelet_answered=memory.kubelet.reached,
            ready=facts.ready if facts else "",
            lease_still_since=memory.lease_since,
            renew_interval_s=memory.renew_interval_s,
            deleted=not self._nodes.exists(name),
        )

    def _node_changed(self, name: str) -> None:
        for key, targets in self._targets.items():
            if any(target.pod.node == name for target in targets):
                self.changed(key)


async def _ask(session: aiohttp.ClientSession, pod: PodView, port: int) -> tuple[bool, bytes | None]:
    """Whether a worker or a router takes up a connection, and what it answers; None: nothing.

    Whether that is well does not matter: how it is doing is for the kubelet's probes.
    """
    try:
        url = url_of(pod.ip, port, "/health", tls=pod.tls)
        async with session.get(url, allow_redirects=False, ssl=False) as answer:
            health = await answer.content.read(MAX_HEALTH)
            await answer.read()
    except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError, ValueError):
        return False, None
    except (aiohttp.ClientError, TimeoutError, OSError):
        return True, None
    return True, health


async def _all(work: Iterable[Awaitable[None]]) -> None:
    await asyncio.gather(*work)
