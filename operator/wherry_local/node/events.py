"""Events as the kubelet writes them; a repeated one counts up."""

import asyncio
import logging
import uuid
from typing import Any

from wherry_local.kube import UNREACHABLE, ApiError, Kube
from wherry_local.node.status import timestamp

log = logging.getLogger("wherry.local.events")
_KEPT = 1000


class Events:
    """Writes events in the background; an event that cannot be written is logged and dropped."""

    def __init__(self, kube: Kube, node: str) -> None:
        self.kube = kube
        self.node = node
        self._known: dict[tuple[str, ...], dict[str, Any]] = {}
        self._queue: asyncio.Queue[tuple[dict[str, Any], str, str, str, str]] = asyncio.Queue(1000)

    def write(
        self, pod: dict[str, Any], reason: str, message: str, container: str = "", *, warning: bool = False
    ) -> None:
        """Queue an event about `pod`, or about one of its containers."""
        try:
            self._queue.put_nowait((pod, reason, message, container, "Warning" if warning else "Normal"))
        except asyncio.QueueFull:
            log.warning("too many events; dropped %s: %s", reason, message)

    async def run(self) -> None:
        """Write queued events until cancelled."""
        while True:
            item = await self._queue.get()
            try:
                await self._write(*item)
            except (ApiError, *UNREACHABLE) as error:
                if not (isinstance(error, ApiError) and error.status in (403, 404)):  # its namespace is going away
                    log.warning("event %s: %s", item[1], error)

    async def _write(self, pod: dict[str, Any], reason: str, message: str, container: str, kind: str) -> None:
        metadata, now = pod["metadata"], timestamp()
        base = f"/api/v1/namespaces/{metadata['namespace']}/events"
        key = (metadata["uid"], reason, message, container)
        if known := self._known.get(key):
            known["count"] += 1
            try:
                await self.kube.patch(f"{base}/{known['name']}", {"count": known["count"], "lastTimestamp": now})
            except ApiError as error:
                if error.status != 404:
                    raise
            else:
                return
        name = f"{metadata['name'][:220]}.{uuid.uuid4().hex[:16]}"
        about = {"kind": "Pod", "apiVersion": "v1", "resourceVersion": metadata.get("resourceVersion", "")}
        about |= {key: metadata[key] for key in ("name", "namespace", "uid")}
        if container:
            about["fieldPath"] = f"spec.containers{{{container}}}"
        body = {
            "metadata": {"name": name, "namespace": metadata["namespace"]},
            "involvedObject": about,
            "reason": reason,
            "message": message[:1024],
            "type": kind,
            "source": {"component": "kubelet", "host": self.node},
            "reportingComponent": "kubelet",
            "reportingInstance": self.node,
            "firstTimestamp": now,
            "lastTimestamp": now,
            "count": 1,
        }
        await self.kube.create(base, body)
        if len(self._known) >= _KEPT:
            self._known.pop(next(iter(self._known)))
        self._known[key] = {"name": name, "count": 1}
