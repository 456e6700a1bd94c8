"""The same world in local mode: a real control plane, an `LLMDeployment`, and its pods' processes and nodes."""

import asyncio
import base64
import contextlib
import ctypes
import os
import re
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import aiohttp
import msgspec
from tests.local.harness import TestCluster, local_cluster
from tests.reliability.workload import Fault
from tests.reliability.world import until

from wherry_local.paths import ENV_MARK_CONTAINER
from wherry_local.processes import marked
from wherry_protocol.naming import ROUTER_PORT, WORKER_PORT
from wherry_protocol.router_report import PATH as REPORT_PATH
from wherry_protocol.router_report import RouterReport
from wherry_protocol.worker import LoadReport

_SELECTOR = "inference.wherry.dev/deployment=chat"
_ONE_THREAD = ("sh", "-c", 'exec wherry-runtime "$@" --threads=1', "sh")
_MANIFEST: dict[str, Any] = {
    "apiVersion": "inference.wherry.dev/v1alpha1",
    "kind": "LLMDeployment",
    "metadata": {"name": "chat", "namespace": "default"},
    "spec": {
        "model": {"name": "tiny", "uri": "sample://tiny"},
        "replicas": 3,
        "dtype": "float32",
        "batching": {"kvCacheMemory": "64Mi", "maxRunning": 32},
        "rolloutStrategy": {"drainTimeout": "2s"},
        "resources": {"requests": {"cpu": "100m", "memory": "768Mi"}, "limits": {"memory": "1Gi"}},
        # Local mode enforces no CPU limit, and three engines that each take the whole machine are in each other's way.
        "podTemplate": {"spec": {"containers": [{"name": "runtime", "command": [*_ONE_THREAD]}]}},
    },
}
_SYS_PIDFD_GETFD = 438  # the same on every architecture
_report = msgspec.json.Decoder(RouterReport).decode
_load = msgspec.json.Decoder(LoadReport).decode


def _listens_on(pid: int, port: int) -> list[int]:
    """File descriptors of `pid` that are established TCP connections to its `port`."""
    rows = [line.split() for line in Path(f"/proc/{pid}/net/tcp").read_text().splitlines()[1:]]
    inodes = {row[9] for row in rows if row[3] == "01" and row[1].endswith(f":{port:04X}")}
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            match = re.fullmatch(r"socket:\[(\d+)\]", str(entry.readlink()))
            if match and match[1] in inodes:
                found.append(int(entry.name))
    return found


def cut_connections(pid: int, port: int) -> int:
    """Shuts down every TCP connection to `port` of another process, which finds them ended. How many there were.

    Raises:
        PermissionError: the kernel does not let this process reach into that one.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    handle = os.pidfd_open(pid)
    try:
        cut = 0
        for number in _listens_on(pid, port):
            mine = libc.syscall(_SYS_PIDFD_GETFD, handle, number, 0)
            if mine < 0:
                error = ctypes.get_errno()
                if error == 1:
                    raise PermissionError(error, os.strerror(error))
                continue  # it has just been closed
            with socket.socket(fileno=mine) as sock, contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
                cut += 1
        return cut
    finally:
        os.close(handle)


def may_cut() -> bool:
    """Whether the kernel lets this process reach into others of its user that are none of its children."""
    scope = Path("/proc/sys/kernel/yama/ptrace_scope")
    return os.geteuid() == 0 or not scope.exists() or scope.read_text().strip() == "0"


class LocalWorld:
    """See `World`. Worker N is a pod; where one is replaced, its successor takes the number."""

    model = "tiny"
    size = 3

    def __init__(self, cluster: TestCluster, url: str, token: str) -> None:
        some: tuple[Fault, ...] = ("kill", "freeze", "blink", "freeze then kill", "drain", "lose the node")
        self.faults: tuple[Fault, ...] = (*some, "cut") if may_cut() else some
        self._cluster = cluster
        self.routers = [url]
        headers = {"authorization": f"Bearer {token}"}
        self._http = aiohttp.ClientSession(headers=headers, trust_env=False, timeout=aiohttp.ClientTimeout(total=3))
        self._pods: list[str] = [""] * self.size
        self._addresses: dict[str, str] = {}  # of runtime pods, by name
        self._nodes: dict[str, str] = {}
        self._routers: dict[str, str] = {}  # addresses of router pods, and their nodes
        self._frozen: dict[int, list[int]] = {}
        self._lost: set[str] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    async def close(self) -> None:
        for task in self._tasks:
            task.cancel()
        await self._http.close()

    async def _get(self, url: str) -> bytes | None:
        try:
            async with self._http.get(url) as response:
                return await response.read() if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError):
            return None

    async def _look(self) -> None:
        """Reads the pods, and numbers those that are new."""
        listed = await asyncio.to_thread(self._cluster.get, "pods", "-l", _SELECTOR)
        addresses, nodes, routers = {}, {}, {}
        for item in listed.get("items", []):
            address = item["status"].get("podIP")
            if not address or "deletionTimestamp" in item["metadata"]:
                continue
            name, node = item["metadata"]["name"], item["spec"]["nodeName"]
            if item["metadata"]["labels"]["app.kubernetes.io/component"] == "router":
                routers[address] = node
            else:
                addresses[name], nodes[name] = address, node
        self._addresses, self._nodes, self._routers = addresses, nodes, routers
        unnumbered = sorted(addresses.keys() - set(self._pods))
        for number, name in enumerate(self._pods):
            if name not in addresses:
                self._pods[number] = unnumbered.pop(0) if unnumbered else ""

    async def healthy(self) -> set[int]:
        """See `World`."""
        await self._look()
        found = {number for number, name in enumerate(self._pods) if name}
        answers = await asyncio.gather(*(self._get(f"http://{ip}:{ROUTER_PORT}{REPORT_PATH}") for ip in self._routers))
        for answer in answers:
            replicas = _report(answer).replicas if answer else []
            well = {replica.name.partition("/")[0] for replica in replicas if replica.state == "routable"}
            found = {number for number in found if self._pods[number] in well}
        return found if answers else set()

    def _processes(self, name: str) -> list[int]:
        """Processes of the pod's container, without the shim that watches over them."""
        item = self._cluster.get("pod", name)
        directory = self._cluster.home.node(item["spec"]["nodeName"]) / "pods" / item["metadata"]["uid"]
        run = directory / "containers" / "runtime" / str(item["status"]["containerStatuses"][0]["restartCount"])
        pids = marked(ENV_MARK_CONTAINER, str(run))
        return [pid for pid in pids if b"shim.py" not in Path(f"/proc/{pid}/cmdline").read_bytes()]

    async def do(self, what: Fault, worker: int) -> None:
        """See `World`."""
        name = self._pods[worker]
        if what == "drain":
            await asyncio.to_thread(self._cluster.kubectl, "delete", "pod", name, "--wait=false")
            return
        node = self._nodes[name]
        if what == "lose the node" and node not in self._routers.values() and await self._well_elsewhere(node):
            self._lost.add(node)
            await asyncio.to_thread(self._cluster.cluster.kill_node, node)
            return
        pids = await asyncio.to_thread(self._processes, name)
        if what == "cut":
            for pid in pids:
                cut_connections(pid, WORKER_PORT)
        elif what in ("kill", "lose the node"):
            _send(pids, signal.SIGKILL)
        else:
            self._frozen.setdefault(worker, []).extend(pids)
            _send(pids, signal.SIGSTOP)
            if what == "blink":
                self._later(0.3, pids, signal.SIGCONT)
            elif what == "freeze then kill":
                self._later(0.8, pids, signal.SIGKILL)

    async def _well_elsewhere(self, node: str) -> bool:
        """Whether a well worker is left without that node, which may have several."""
        well = await self.healthy() - self._frozen.keys()
        return any(self._nodes[self._pods[number]] != node for number in well)

    def _later(self, delay_s: float, pids: list[int], number: int) -> None:
        async def send() -> None:
            await asyncio.sleep(delay_s)
            _send(pids, number)

        task = asyncio.create_task(send())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def mend(self, worker: int) -> None:
        """See `World`."""
        _send(self._frozen.pop(worker, []), signal.SIGCONT)
        while self._lost:
            await asyncio.to_thread(self._cluster.cluster.start_node, self._lost.pop())

    async def loads(self) -> dict[str, tuple[int, int]]:
        """See `World`."""
        await self._look()
        found = {}
        for name, address in self._addresses.items():
            if answer := await self._get(f"http://{address}:{WORKER_PORT}/load"):
                load = _load(answer)
                found[name] = (load.running, load.waiting)
        return found


def _send(pids: list[int], number: int) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def _wait_ready(cluster: TestCluster) -> None:
    try:
        cluster.kubectl("wait", "--for=condition=Ready", "llmdeployment/chat", "--timeout=110s")
    except AssertionError:
        status = msgspec.json.encode(cluster.get("llmdeployment", "chat").get("status", {})).decode()
        pods = cluster.kubectl("get", "pods", "-o", "wide", check=False)
        raise AssertionError(f"the deployment is not ready: {status}\n{pods}") from None


@contextlib.asynccontextmanager
async def local_world() -> AsyncIterator[LocalWorld]:
    """A local cluster with three nodes and an `LLMDeployment` of three replicas, all routable."""
    with contextlib.ExitStack() as stack:
        cluster = await asyncio.to_thread(stack.enter_context, local_cluster(nodes=3, operator=True))
        await asyncio.to_thread(cluster.apply, _MANIFEST)
        await asyncio.to_thread(_wait_ready, cluster)
        url = cluster.get("llmdeployment", "chat")["status"]["url"]
        secret = cluster.get("secret", "chat-worker-token")
        token = base64.b64decode(secret["data"]["token"]).decode()
        world = LocalWorld(cluster, url, token)
        try:

            async def all_there() -> bool:
                return len(await world.healthy()) == world.size

            await until(all_there, "all pods to be routable", 90)
            yield world
        finally:
            await world.close()
