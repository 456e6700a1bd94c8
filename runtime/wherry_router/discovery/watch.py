"""Lists and watches a deployment's pods.

https://kubernetes.io/docs/reference/using-api/api-concepts/#efficient-detection-of-changes

The API server may go away for as long as it likes: the last known set stays in use, and whatever of it has died is
found out by the requests themselves.
"""

import asyncio
import contextlib
import json
import logging
import os
import random
import time
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
from kubernetes.aio import client, config

from wherry_protocol.naming import COMPONENT_RUNTIME, LABEL_COMPONENT, LABEL_DEPLOYMENT
from wherry_router.discovery.pods import PodSet
from wherry_router.pool import Pool

log = logging.getLogger("wherry.router.discovery")

# The server ends a watch after this; the client gives up a little later, should the connection be dead. Short, since
# nothing else tells a dead connection from a quiet one.
_WATCH_S = 60
_SILENCE_S = _WATCH_S + 15
_LIST_TIMEOUT_S = 15
_BACKOFF_S = (0.2, 5.0)
_MAX_LINE = 16 * 1024 * 1024


class Expired(Exception):
    """410: the resource version is too old to watch from."""


async def api_client(kubeconfig: str | None) -> client.ApiClient:
    """A client: from the given kubeconfig or $KUBECONFIG, else in the cluster, else from ~/.kube/config.

    Raises:
        config.ConfigException: none of them is there or can be read.
    """
    settings = client.Configuration()
    path = kubeconfig or os.environ.get("KUBECONFIG")
    if path:
        await config.load_kube_config(config_file=path, client_configuration=settings)
    elif "KUBERNETES_SERVICE_HOST" in os.environ:
        config.load_incluster_config(client_configuration=settings)
    else:
        default = str(Path.home() / ".kube" / "config")
        await config.load_kube_config(config_file=default, client_configuration=settings)
    return client.ApiClient(configuration=settings)


class PodWatch:
    """Keeps `pool` equal to what the deployment's pods add up to, for ever; `secure`: to those with mutual TLS."""

    def __init__(
        self, api: client.ApiClient, namespace: str, deployment: str, pool: Pool, *, secure: bool = False
    ) -> None:
        self._core = client.CoreV1Api(api)
        self._namespace = namespace
        self._selector = f"{LABEL_DEPLOYMENT}={deployment},{LABEL_COMPONENT}={COMPONENT_RUNTIME}"
        self._pool = pool
        self._pods = PodSet(secure=secure)
        self._foreign: list[str] = []

    async def run(self) -> None:
        """List, watch, and again; with growing pauses while the API server does not answer."""
        failures = 0
        fresh = True
        while True:
            try:
                if fresh:
                    await self._list()
                    fresh = False
                async for kind, pod in self._watch():
                    failures = 0
                    if self._pods.apply(kind, pod):
                        self._publish()
            except Expired:
                fresh = True
            except (client.ApiException, aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError) as error:
                failures += 1
                # What happened in between may be lost, and a list tells for certain.
                fresh = True
                log.warning("no watch on pods", extra={"fields": {"error": str(error)[:300], "failures": failures}})
                await asyncio.sleep(_pause(failures))

    def _publish(self) -> None:
        targets = self._pods.targets
        self._tell_foreign()
        if self._pods.foreign and not targets and not self._pool.known:
            # In a rollout that turns mutual TLS on or off this router is ahead of the replicas. Until it has one it is
            # not ready, and the routers from before go on.
            return
        # Deadlines are wall-clock times of the operator; from here on only this process's steady clock counts.
        offset = asyncio.get_running_loop().time() - time.time()
        draining = {t.endpoint: None if t.deadline is None else t.deadline + offset for t in targets if t.draining}
        names = {
            "routable": [t.endpoint.name for t in targets if not t.draining],
            "draining": [t.endpoint.name for t in targets if t.draining],
        }
        log.info("replicas", extra={"fields": names})
        self._pool.set_endpoints([target.endpoint for target in targets], draining)

    def _tell_foreign(self) -> None:
        if self._pods.foreign == self._foreign:
            return
        self._foreign = self._pods.foreign
        if self._foreign:
            why = "they speak plain HTTP, this router only mutual TLS"
            if not self._pods.secure:
                why = "they speak mutual TLS, this router plain HTTP"
            log.warning("pods left out", extra={"fields": {"pods": self._foreign[:20], "why": why}})

    async def _list(self) -> None:
        async with asyncio.timeout(_LIST_TIMEOUT_S):
            response = await self._core.list_namespaced_pod_without_preload_content(
                self._namespace, label_selector=self._selector
            )
            with contextlib.closing(response):
                _raise_for(response.status, await response.read())
                self._pods.reset(json.loads(await response.read()))
        self._publish()

    async def _watch(self) -> AsyncGenerator[tuple[str, dict[str, Any]], None]:
        async with asyncio.timeout(_LIST_TIMEOUT_S):
            response = await self._core.list_namespaced_pod_without_preload_content(
                self._namespace,
                label_selector=self._selector,
                resource_version=self._pods.resource_version,
                allow_watch_bookmarks=True,
                watch=True,
                timeout_seconds=_WATCH_S,
                _request_timeout=_SILENCE_S,
            )
        with contextlib.closing(response):
            if response.status != 200:
                _raise_for(response.status, await response.read())
            async for line in _lines(response):
                event = json.loads(line)
                if event["type"] == "ERROR":
                    _raise_for(int(event["object"].get("code") or 500), json.dumps(event["object"]).encode())
                yield event["type"], event["object"]


async def _lines(response: aiohttp.ClientResponse) -> AsyncGenerator[bytes, None]:
    """Lines of any length up to a bound (the stream reader's own limit is too small for a big pod)."""
    buffer = b""
    async for chunk in response.content.iter_any():
        buffer += chunk
        *whole, buffer = buffer.split(b"\n")
        if len(buffer) > _MAX_LINE:
            raise ValueError("a watch event is too long")
        for line in whole:
            if line.strip():
                yield line


def _raise_for(status: int, body: bytes) -> None:
    if status == 410:
        raise Expired
    if status != 200:
        raise ValueError(f"the API server answered {status}: {body[:200].decode(errors='replace')}")


def _pause(failures: int) -> float:
    low, high = _BACKOFF_S
    # Jitter keeps many routers from coming back all at once.
    pause: float = min(low * 2 ** min(failures, 10), high)
    return pause * random.uniform(0.5, 1.0)  # noqa: S311
