"""What the operator knows of the cluster's nodes, kept by a watch: a few words for each, however large the cluster.

A namespaced install may not read nodes. Then there is nothing here, and failover goes by what is left: see failover.py.
"""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from wherry_operator.cluster.client import Api, ApiError, Unavailable, path_of
from wherry_operator.planning.leaving import leaving

logger = logging.getLogger("wherry.operator")

PAGE = "100"
RETRY_S = 2.0
FORBIDDEN_RETRY_S = 300.0
KUBELET_PORT = 10250


@dataclass(frozen=True)
class NodeFacts:
    """One node. `ready`: the status of its condition Ready. `leaving`: the words that say that it is being emptied."""

    name: str
    address: str = ""
    port: int = KUBELET_PORT
    ready: str = ""
    leaving: str = ""

    @classmethod
    def from_raw(cls, raw: dict[str, Any]) -> "NodeFacts":
        """The facts of a Node as the API server sends it."""
        name, status = raw["metadata"]["name"], raw.get("status") or {}
        addresses = {entry["type"]: entry["address"] for entry in reversed(status.get("addresses") or [])}
        ready = next((c["status"] for c in status.get("conditions") or [] if c["type"] == "Ready"), "")
        endpoint = (status.get("daemonEndpoints") or {}).get("kubeletEndpoint") or {}
        port = endpoint.get("Port") or KUBELET_PORT
        return cls(name, addresses.get("InternalIP", ""), port, ready, leaving([raw]).get(name, ""))


class Nodes:
    """The nodes, followed. `changed` is told the name of a node that leaves, stays after all, or is ready or not."""

    def __init__(self, api: Api, changed: Callable[[str], None] = lambda _: None) -> None:
        self._api = api
        self.changed = changed
        self._facts: dict[str, NodeFacts] = {}
        self.readable = False
        self.known = asyncio.Event()  # the first answer is there, whatever it was

    def get(self, name: str) -> NodeFacts | None:
        """The facts of a node; None where there is no such node, or it may not be read."""
        return self._facts.get(name)

    def exists(self, name: str) -> bool:
        """Whether there is such a node, as far as the operator may know."""
        return not self.readable or name in self._facts

    def names(self) -> list[str]:
        """All nodes' names."""
        return list(self._facts)

    def leaving(self) -> dict[str, str] | None:
        """The nodes that are being emptied and the words that say so; None where nodes may not be read."""
        if not self.readable:
            return None
        return {name: facts.leaving for name, facts in self._facts.items() if facts.leaving}

    async def run(self) -> None:
        """Follows the nodes until cancelled."""
        while True:
            try:
                await self._follow(await self._list())
            except ApiError as error:
                if error.code in (401, 403):
                    await self._do_without(error)
                elif error.code != 410:
                    logger.warning("watching nodes: %s", error)
                    await asyncio.sleep(RETRY_S)
            except Unavailable as error:
                logger.info("watching nodes: %s", error)
                await asyncio.sleep(RETRY_S)

    async def _do_without(self, error: ApiError) -> None:
        self.readable = False
        self._facts.clear()
        self.known.set()
        logger.info("nodes may not be read, so failover goes by pods and kubelets alone: %s", error.message)
        await asyncio.sleep(FORBIDDEN_RETRY_S)

    async def _list(self) -> str:
        """Reads all nodes, a page at a time so that no answer holds up the event loop; returns the version read."""
        found: dict[str, NodeFacts] = {}
        query = {"limit": PAGE}
        while True:
            answer = await self._api.request("GET", path_of("Node", None), query=query)
            for raw in answer.get("items", []):
                found[raw["metadata"]["name"]] = NodeFacts.from_raw(raw)
            following = answer["metadata"].get("continue")
            if not following:
                break
            query = {"limit": PAGE, "continue": following}
        before, self._facts, self.readable = self._facts, found, True
        self.known.set()
        for name in before.keys() | found.keys():
            self._compare(before.get(name), found.get(name))
        return str(answer["metadata"]["resourceVersion"])

    async def _follow(self, version: str) -> None:
        while True:
            async for event in self._api.watch(path_of("Node", None), version):
                raw = event["object"]
                version = raw["metadata"]["resourceVersion"]
                if event["type"] == "BOOKMARK":
                    continue
                name = raw["metadata"]["name"]
                before = self._facts.pop(name, None)
                if event["type"] != "DELETED":
                    self._facts[name] = NodeFacts.from_raw(raw)
                self._compare(before, self._facts.get(name))

    def _compare(self, before: NodeFacts | None, after: NodeFacts | None) -> None:
        was = (before.leaving, before.ready) if before else None
        now = (after.leaving, after.ready) if after else None
        if was != now and (known := before or after):
            self.changed(known.name)
