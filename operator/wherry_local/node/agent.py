"""The node itself: registration, heartbeat, and the pods bound to it."""

import asyncio
import contextlib
import logging
import os
import platform
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherry_local import addresses
from wherry_local.files import read_json
from wherry_local.kube import STRATEGIC, UNREACHABLE, ApiError, Kube, Object
from wherry_local.node import memory
from wherry_local.node.container import Container
from wherry_local.node.events import Events
from wherry_local.node.pod import PodWorker
from wherry_local.node.process import Run
from wherry_local.node.server import NodeServer
from wherry_local.node.status import timestamp, with_transition_times
from wherry_local.paths import ENV_MARK_CONTAINER, Home
from wherry_local.processes import kill_marked

log = logging.getLogger("wherry.local.node")

_PORT = 10250
_LEASE_S = 2.0
_STATUS_S = 10.0
_MEMORY_S = 1.0
_MAX_PODS = 110


@dataclass(frozen=True)
class NodeOptions:
    """The command line of a node; `cpu` and `memory` are quantities."""

    home: Home
    name: str
    address: str
    pod_network: str
    api_service: str
    cpu: str
    memory: str
    backoff_scale: float
    container_env: dict[str, str]


class Node:
    """One process node."""

    def __init__(self, options: NodeOptions) -> None:
        self.options = options
        self.name = options.name
        self.address = options.address
        self.api_service = options.api_service
        self.backoff_scale = options.backoff_scale
        self.container_env = options.container_env
        self.directory: Path = options.home.node(options.name)
        self.kube = Kube(self.directory / "kubeconfig")
        self.events = Events(self.kube, self.name)
        self.pods: dict[str, PodWorker] = {}
        self.allocatable = {
            "cpu": options.cpu,
            "memory": options.memory,
            "pods": str(_MAX_PODS),
            "ephemeral-storage": str(os.statvfs("/").f_bavail * os.statvfs("/").f_frsize),
        }
        self._port = _PORT
        self._last_address = ""

    def take_address(self) -> str:
        """An address for a new pod: the one after the last given out, so that an old one is not soon used again."""
        taken = {worker.ip for worker in self.pods.values()}
        for record in (self.directory / "pods").glob("*/pod.json"):
            taken.add((read_json(record) or {}).get("ip", ""))
        self._last_address = addresses.free_address(self.options.pod_network, taken, after=self._last_address)
        return self._last_address

    def container(self, namespace: str, pod: str, name: str) -> Container | None:
        """The container of that name, if its pod is here; of two pods of one name the one that is not ending."""
        workers = [w for w in self.pods.values() if (w.namespace, w.name) == (namespace, pod)]
        for worker in sorted(workers, key=lambda w: w.removed):
            for container in [*worker.main, *worker.init]:
                if container.name == name:
                    return container
        return None

    async def run(self) -> None:
        """Serve until SIGTERM; pods go on, as they do when a kubelet stops."""
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        server = NodeServer(self)
        self._port = await server.start(self.address, _PORT, self.options.home.pki)
        work = (self._heartbeat(), self._report_status(), self._watch_pods(), self._watch_memory(), self.events.run())
        tasks: list[asyncio.Task[Any]] = [asyncio.create_task(coroutine) for coroutine in work]
        stopped: asyncio.Task[Any] = asyncio.create_task(stop.wait())
        done, _ = await asyncio.wait({stopped, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await server.stop()
        await self.kube.close()
        for task in done - {stopped}:
            task.result()

    async def _report_status(self) -> None:
        """Create the Node object if it is missing and keep its status current."""
        path = f"/api/v1/nodes/{self.name}"
        while True:
            try:
                node = await self.kube.find(path)
                if node is None:
                    node = await self.kube.create("/api/v1/nodes", self._object())
                    log.info("registered as %s", self.name)
                await self.kube.patch(f"{path}/status", {"status": self._status(node)}, STRATEGIC)
            except (ApiError, *UNREACHABLE) as error:
                log.warning("node status: %s", error)
                await asyncio.sleep(1.0)
                continue
            await asyncio.sleep(_STATUS_S)

    def _object(self) -> Object:
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        labels = {"kubernetes.io/hostname": self.name, "kubernetes.io/os": "linux", "kubernetes.io/arch": machine}
        return {"metadata": {"name": self.name, "labels": labels}, "spec": {}}

    def _status(self, node: Object) -> Object:
        now = timestamp()
        facts = [("Ready", "True", "KubeletReady", "the process node is posting ready status")]
        for kind in ("MemoryPressure", "DiskPressure", "PIDPressure"):
            facts.append((kind, "False", "KubeletHasSufficient" + kind.removesuffix("Pressure"), "not measured"))
        conditions: list[Object] = [
            {"type": kind, "status": value, "reason": reason, "message": message, "lastHeartbeatTime": now}
            for kind, value, reason, message in facts
        ]
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        return {
            "addresses": [
                {"type": "InternalIP", "address": self.address},
                {"type": "Hostname", "address": self.name},
            ],
            "capacity": self.allocatable,
            "allocatable": self.allocatable,
            "conditions": with_transition_times(conditions, (node.get("status") or {}).get("conditions") or []),
            "daemonEndpoints": {"kubeletEndpoint": {"Port": self._port}},
            "nodeInfo": {
                "architecture": machine,
                "operatingSystem": "linux",
                "osImage": "local processes",
                "kernelVersion": platform.release(),
                "kubeletVersion": "v1.36.3-wherry-local",
                "kubeProxyVersion": "",
                "containerRuntimeVersion": "process://1",
                "machineID": self.name,
                "systemUUID": self.name,
                "bootID": Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            },
        }

    async def _heartbeat(self) -> None:
        """Renew the node's Lease; the controller manager calls a node lost when it is too old."""
        base = "/apis/coordination.k8s.io/v1/namespaces/kube-node-lease/leases"
        while True:
            now = timestamp().removesuffix("Z") + ".000000Z"
            spec = {"holderIdentity": self.name, "leaseDurationSeconds": 8, "renewTime": now}
            try:
                await self.kube.patch(f"{base}/{self.name}", {"spec": spec})
            except ApiError as error:
                if error.status == 404:
                    with contextlib.suppress(ApiError, *UNREACHABLE):
                        await self.kube.create(base, {"metadata": {"name": self.name}, "spec": spec})
                else:
                    log.warning("lease: %s", error)
            except UNREACHABLE as error:
                log.warning("lease: %s", error or type(error).__name__)
            await asyncio.sleep(_LEASE_S)

    async def _watch_pods(self) -> None:
        await self.kube.follow("/api/v1/pods", self._sync, fieldSelector=f"spec.nodeName={self.name}")

    async def _sync(self, pods: dict[str, Any]) -> None:
        """Make the workers match the pods; the first call also ends what lost its pod while the node was away."""
        for uid, worker in list(self.pods.items()):
            if worker.done:
                del self.pods[uid]
            elif uid not in pods:
                worker.gone()
        for uid, pod in pods.items():
            if uid in self.pods:
                self.pods[uid].update(pod)
            elif not self._over(pod):
                self.pods[uid] = PodWorker(self, pod)
                self.pods[uid].update(pod)
        for path in (self.directory / "pods").glob("*"):
            if path.name not in pods and path.name not in self.pods:
                await asyncio.to_thread(self._discard, path)

    def _over(self, pod: Object) -> bool:
        """True for a pod that ended before and of which nothing is here any more."""
        finished = pod.get("status", {}).get("phase") in ("Succeeded", "Failed")
        here = (self.directory / "pods" / pod["metadata"]["uid"]).exists()
        return finished and not here and "deletionTimestamp" not in pod["metadata"]

    def _discard(self, path: Path) -> None:
        for directory in (path / "containers").glob("*"):
            run = Run.latest(directory)
            if run is not None:
                kill_marked(ENV_MARK_CONTAINER, run.marker)
        shutil.rmtree(path, ignore_errors=True)

    async def _watch_memory(self) -> None:
        """End containers that use more memory than their limit."""
        while True:
            await asyncio.sleep(_MEMORY_S)
            limited: dict[int, tuple[Container, int]] = {}
            for worker in self.pods.values():
                for container in [*worker.init, *worker.main]:
                    limit, run = container.memory_limit, container.current
                    if limit is not None and run is not None and run.session and run.running():
                        limited[run.session] = (container, limit)
            if not limited:
                continue
            used = await asyncio.to_thread(memory.usage, {session: str(session) for session in limited})
            for session, (container, limit_bytes) in limited.items():
                run = container.current
                if used[str(session)] > limit_bytes and run is not None and run.session == session:
                    log.info("container %s uses %d bytes, limit %d", container.name, used[str(session)], limit_bytes)
                    run.oom_killed = True
                    await run.kill()
