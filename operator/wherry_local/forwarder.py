"""Plays kube-proxy: takes connections on each Service's cluster IP and passes them to its ready pods, in turn.

`python -m wherry_local.forwarder --home DIR --api-url URL`. TCP only. A Service without a ready pod has no listener, so
that clients are refused at once, as they are in a cluster.
"""

import argparse
import asyncio
import contextlib
import itertools
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from wherry_local.kube import Kube, Object
from wherry_local.paths import Home

log = logging.getLogger("wherry.local.forwarder")
_CONNECT_S = 3.0
_CHUNK = 64 * 1024

Address = tuple[str, int]


def _ready(pod: Object) -> bool:
    conditions = pod.get("status", {}).get("conditions") or []
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def _target_port(pod: Object, port: Object) -> int | None:
    target = port.get("targetPort") or port["port"]
    if isinstance(target, int):
        return target
    for container in pod["spec"]["containers"]:
        for entry in container.get("ports") or []:
            if entry.get("name") == target:
                return int(entry["containerPort"])
    return None


def routes(services: list[Object], pods: list[Object]) -> dict[Address, list[Address]]:
    """Where connections to each Service address and port go. Pure; addresses with no ready pod are left out."""
    result: dict[Address, list[Address]] = {}
    for service in services:
        spec = service["spec"]
        address, selector = spec.get("clusterIP"), spec.get("selector")
        if not address or address == "None" or not selector:
            continue
        matching = []
        for pod in pods:
            labels = pod["metadata"].get("labels") or {}
            if pod["metadata"]["namespace"] != service["metadata"]["namespace"]:
                continue
            if selector.items() <= labels.items() and pod.get("status", {}).get("podIP"):
                going = "deletionTimestamp" in pod["metadata"]
                if spec.get("publishNotReadyAddresses") or (_ready(pod) and not going):
                    matching.append(pod)
        for port in spec.get("ports") or []:
            if port.get("protocol", "TCP") != "TCP":
                continue
            backends = [(pod["status"]["podIP"], number) for pod in matching if (number := _target_port(pod, port))]
            if backends:
                result[address, int(port["port"])] = sorted(backends)
    return result


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Copy until the sender closes its half, then close that half here too."""
    while data := await reader.read(_CHUNK):
        writer.write(data)
        await writer.drain()
    if writer.can_write_eof():
        writer.write_eof()


@dataclass
class Listener:
    """One Service address and port."""

    backends: list[Address]
    server: asyncio.Server | None = None
    turn: Iterator[int] = field(default_factory=itertools.count)

    def in_turn(self) -> list[Address]:
        """All backends, beginning with the one whose turn it is."""
        start = next(self.turn) % len(self.backends)
        return self.backends[start:] + self.backends[:start]

    async def _connect(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        for host, port in self.in_turn():
            with contextlib.suppress(OSError, TimeoutError):
                async with asyncio.timeout(_CONNECT_S):
                    return await asyncio.open_connection(host, port)
        return None

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Carry one connection; when either side breaks, both are cut."""
        backend = None
        try:
            backend = await self._connect()
            if backend is None:
                return
            async with asyncio.TaskGroup() as group:
                group.create_task(_pump(reader, backend[1]))
                group.create_task(_pump(backend[0], writer))
        except* OSError as broken:
            log.debug("connection broke: %s", broken.exceptions)
            for side in (writer, backend[1] if backend else None):
                if side is not None:
                    side.transport.abort()
        finally:
            for side in (writer, backend[1] if backend else None):
                if side is not None:
                    side.close()


class Forwarder:
    """Keeps the listeners in line with Services and pods."""

    def __init__(self, kube: Kube, api: Address) -> None:
        self.kube = kube
        self.api = api
        self.services: dict[str, Object] = {}
        self.pods: dict[str, Object] = {}
        self.listeners: dict[Address, Listener] = {}
        self._changed = asyncio.Event()

    async def _set_services(self, objects: dict[str, Object]) -> None:
        self.services = objects
        self._changed.set()

    async def _set_pods(self, objects: dict[str, Object]) -> None:
        self.pods = objects
        self._changed.set()

    def _wanted(self) -> dict[Address, list[Address]]:
        wanted = routes(list(self.services.values()), list(self.pods.values()))
        for service in self.services.values():
            if (service["metadata"]["namespace"], service["metadata"]["name"]) == ("default", "kubernetes"):
                wanted[service["spec"]["clusterIP"], 443] = [self.api]
        return wanted

    async def _reconcile(self) -> None:
        while True:
            await self._changed.wait()
            self._changed.clear()
            wanted = self._wanted()
            for address in [address for address in self.listeners if address not in wanted]:
                server = self.listeners.pop(address).server
                if server is not None:
                    server.close()
            for address, backends in wanted.items():
                listener = self.listeners.get(address)
                if listener is not None:
                    listener.backends = backends
                    continue
                listener = Listener(backends)
                try:
                    listener.server = await asyncio.start_server(listener.handle, *address, backlog=1024)
                except OSError as error:
                    log.warning("cannot listen on %s:%d: %s", *address, error)
                    continue
                self.listeners[address] = listener
            await asyncio.sleep(0.02)

    async def run(self) -> None:
        """Serve until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self.kube.follow("/api/v1/services", self._set_services))
            group.create_task(self.kube.follow("/api/v1/pods", self._set_pods))
            group.create_task(self._reconcile())


async def _run(home: Home, api_url: str) -> None:
    parts = urlsplit(api_url)
    async with Kube(home.root / "forwarder.kubeconfig") as kube:
        task = asyncio.create_task(Forwarder(kube, (str(parts.hostname), int(parts.port or 443))).run())
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        with contextlib.suppress(asyncio.CancelledError):
            await task


def main() -> None:
    """Run until SIGTERM."""
    parser = argparse.ArgumentParser(prog="wherry_local.forwarder")
    parser.add_argument("--home", required=True, type=Path)
    parser.add_argument("--api-url", required=True)
    values = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    asyncio.run(_run(Home(values.home), values.api_url))


if __name__ == "__main__":
    main()
