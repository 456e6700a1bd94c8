"""A small asynchronous Kubernetes client over plain JSON objects.

The typed client takes a second of CPU to import, which three nodes starting on a small machine would feel, and what a
kubelet needs is this much: read, write, and a watch that lists again when it falls behind.
"""

import asyncio
import json
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import yaml

log = logging.getLogger("wherry.local.kube")

Object = dict[str, Any]
MERGE, STRATEGIC, APPLY = (
    "application/merge-patch+json",
    "application/strategic-merge-patch+json",
    "application/apply-patch+yaml",
)


class ApiError(Exception):
    """The API server refused: `status` is the HTTP status, `reason` the machine-readable cause."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(f"{status} {reason}: {message}")
        self.status = status
        self.reason = reason


UNREACHABLE = (aiohttp.ClientError, TimeoutError, ConnectionError)


class Kube:
    """One connection pool to the API server. Close it, or use it as an asynchronous context manager."""

    def __init__(self, kubeconfig: Path) -> None:
        document = yaml.safe_load(kubeconfig.read_text())
        cluster, user = document["clusters"][0]["cluster"], document["users"][0]["user"]
        self.server = str(cluster["server"])
        self._tls = ssl.create_default_context(cafile=cluster["certificate-authority"])
        self._tls.load_cert_chain(user["client-certificate"], user["client-key"])
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> "Kube":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the connections."""
        if self._session is not None:
            await self._session.close()

    def _open(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(ssl=self._tls, limit=0)
            self._session = aiohttp.ClientSession(
                connector=connector, timeout=aiohttp.ClientTimeout(total=30, sock_connect=5)
            )
        return self._session

    async def request(
        self, method: str, path: str, body: Object | None = None, query: dict[str, str] | None = None, kind: str = ""
    ) -> Object:
        """Call the API. Raises ApiError when it answers with an error, one of UNREACHABLE when it does not answer."""
        headers = {"Content-Type": kind or "application/json", "Accept": "application/json"}
        data = None if body is None else json.dumps(body)
        async with self._open().request(method, self.server + path, data=data, params=query, headers=headers) as answer:
            text = await answer.text()
            if answer.status < 400:
                return json.loads(text) if text.startswith("{") else {"body": text}
            try:
                status = json.loads(text)
            except ValueError:
                status = {"message": text.strip()}
            raise ApiError(answer.status, status.get("reason", ""), status.get("message", ""))

    async def get(self, path: str, **query: str) -> Object:
        """Read an object or a list."""
        return await self.request("GET", path, query=query)

    async def find(self, path: str) -> Object | None:
        """Read an object; None when there is none."""
        try:
            return await self.get(path)
        except ApiError as error:
            if error.status == 404:
                return None
            raise

    async def create(self, path: str, body: Object) -> Object:
        """Create an object in the collection `path`."""
        return await self.request("POST", path, body)

    async def patch(self, path: str, body: Object, kind: str = MERGE, **query: str) -> Object:
        """Patch an object."""
        return await self.request("PATCH", path, body, query, kind)

    async def apply(self, path: str, body: Object, manager: str) -> Object:
        """Server-side apply, taking over fields that another manager has."""
        return await self.patch(path, body, APPLY, fieldManager=manager, force="true")

    async def delete(self, path: str, body: Object | None = None) -> None:
        """Delete an object; it is no error if there is none."""
        try:
            await self.request("DELETE", path, body)
        except ApiError as error:
            if error.status != 404:
                raise

    async def watch(self, path: str, version: str, **query: str) -> AsyncIterator[tuple[str, Object]]:
        """Events (type, object) after `version`, until the server ends the watch."""
        params = query | {"watch": "true", "resourceVersion": version, "allowWatchBookmarks": "true"}
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=5, sock_read=330)
        async with self._open().get(self.server + path, params=params, timeout=timeout) as answer:
            if answer.status >= 400:
                raise ApiError(answer.status, "", await answer.text())
            buffer = bytearray()
            async for chunk in answer.content.iter_any():
                buffer += chunk
                *lines, rest = buffer.split(b"\n")
                buffer = bytearray(rest)
                for line in lines:
                    event = json.loads(line)
                    yield event["type"], event["object"]

    async def follow(
        self,
        path: str,
        changed: Callable[[dict[str, Object]], Awaitable[None]],
        **query: str,
    ) -> None:
        """Call `changed` with all objects of a collection, by uid, now and after every change; never returns."""
        while True:
            try:
                await self._follow_once(path, changed, query)
            except (*UNREACHABLE, ApiError) as error:
                if not isinstance(error, ApiError) or error.status != 410:
                    log.warning("watching %s: %s; listing again", path, error or type(error).__name__)
                    await asyncio.sleep(0.5)

    async def _follow_once(
        self, path: str, changed: Callable[[dict[str, Object]], Awaitable[None]], query: dict[str, str]
    ) -> None:
        listed = await self.get(path, **query)
        objects = {item["metadata"]["uid"]: item for item in listed["items"]}
        await changed(objects)
        version = listed["metadata"]["resourceVersion"]
        while True:
            async for kind, item in self.watch(path, version, **query):
                if kind == "ERROR":
                    raise ApiError(int(item.get("code", 500)), item.get("reason", ""), item.get("message", ""))
                version = item["metadata"]["resourceVersion"]
                if kind == "BOOKMARK":
                    continue
                if kind == "DELETED":
                    objects.pop(item["metadata"]["uid"], None)
                else:
                    objects[item["metadata"]["uid"]] = item
                await changed(objects)
