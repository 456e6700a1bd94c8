"""Plain requests to the API server through kubernetes.aio: JSON in, JSON out, with deadlines and retries."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import quote

import aiohttp
from kubernetes.aio import client, config

APPLY = "application/apply-patch+yaml"
MERGE = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC = "application/strategic-merge-patch+json"

READ_TIMEOUT_S = 15.0
# A write that was begun as the leader must be over before anyone else may lead: see election.py.
WRITE_TIMEOUT_S = 4.0
# The API server ends a watch after the first, and a watch of which nothing is heard is given up after the second.
WATCH_S = 240
WATCH_TIMEOUT_S = 300.0
# Waits between tries of one request; whatever still fails then is for the queue's backoff.
RETRY_DELAYS_S = (0.2, 0.5, 1.0)

GROUPS = {
    "Pod": ("api/v1", "pods"),
    "Node": ("api/v1", "nodes"),
    "Service": ("api/v1", "services"),
    "Secret": ("api/v1", "secrets"),
    "ServiceAccount": ("api/v1", "serviceaccounts"),
    "Event": ("api/v1", "events"),
    "Deployment": ("apis/apps/v1", "deployments"),
    "ControllerRevision": ("apis/apps/v1", "controllerrevisions"),
    "PodDisruptionBudget": ("apis/policy/v1", "poddisruptionbudgets"),
    "Role": ("apis/rbac.authorization.k8s.io/v1", "roles"),
    "RoleBinding": ("apis/rbac.authorization.k8s.io/v1", "rolebindings"),
    "Lease": ("apis/coordination.k8s.io/v1", "leases"),
    "LLMDeployment": ("apis/inference.wherry.dev/v1alpha1", "llmdeployments"),
}


class ApiError(Exception):
    """The API server's answer was an error. `code` is the HTTP status, `message` its own words."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(f"{code} {reason}: {message}")
        self.code, self.reason, self.message = code, reason, message


class Unavailable(Exception):
    """The API server did not answer, or not in time. Nothing is known about what became of the request."""


class LostLeadership(Exception):
    """A write was stopped because another operator may be acting now."""


def path_of(kind: str, namespace: str | None, name: str = "", subresource: str = "") -> str:
    """The URL path of one object, or of the collection when `name` is empty."""
    group, plural = GROUPS[kind]
    parts = [group, *(("namespaces", namespace) if namespace else ()), plural]
    return "/" + "/".join(quote(part, safe="/") for part in (*parts, name, subresource) if part)


class Api:
    """The one way to the API server. `may_write` is asked before each write: a lost leader election says no."""

    def __init__(self, api_client: Any, may_write: Callable[[], bool] = lambda: True) -> None:
        self._client = api_client
        self._may_write = may_write

    @classmethod
    async def connect(cls, kubeconfig: str | None = None, may_write: Callable[[], bool] = lambda: True) -> "Api":
        """A client that is configured as `configuration` says."""
        return cls(client.ApiClient(configuration=await cls.configuration(kubeconfig)), may_write)

    @staticmethod
    async def configuration(kubeconfig: str | None = None) -> Any:
        """From `kubeconfig`, else $KUBECONFIG, else the pod's service account, else ~/.kube/config."""
        settings = client.Configuration()
        path = kubeconfig or os.environ.get("KUBECONFIG")
        if path or "KUBERNETES_SERVICE_HOST" not in os.environ:
            await config.load_kube_config(config_file=path, client_configuration=settings)
        else:
            config.load_incluster_config(client_configuration=settings)
        return settings

    async def close(self) -> None:
        await self._client.close()

    async def request(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, str] | None = None,
        body: Any = None,
        content_type: str = "application/json",
    ) -> dict[str, Any]:
        """One request; safe to repeat ones are, while the server does not answer or is overloaded.

        Raises:
            ApiError: an answer of 400 and above.
            Unavailable: no answer.
            LostLeadership: a write without being the leader.
        """
        delays = RETRY_DELAYS_S if method == "GET" else ()
        for delay in (*delays, None):
            try:
                return await self._once(method, path, query or {}, body, content_type)
            except ApiError as error:
                if delay is None or error.code not in (429, 500, 502, 503, 504):
                    raise
            except Unavailable:
                if delay is None:
                    raise
            await asyncio.sleep(delay)
        raise Unavailable(path)

    async def _once(
        self, method: str, path: str, query: dict[str, str], body: Any, content_type: str
    ) -> dict[str, Any]:
        if method != "GET" and "dryRun" not in query and not self._may_write():
            raise LostLeadership(f"{method} {path}")
        timeout_s = READ_TIMEOUT_S if method == "GET" else WRITE_TIMEOUT_S
        headers = {"Accept": "application/json", "Content-Type": content_type}
        try:
            async with asyncio.timeout(timeout_s):
                prepared = await self._client.param_serialize(
                    method, path, query_params=list(query.items()), header_params=headers, body=body,
                    auth_settings=["BearerToken"],
                )  # fmt: skip
                response = await self._client.call_api(*prepared, _request_timeout=timeout_s)
                data = await response.read()
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Unavailable(f"{method} {path}: {type(error).__name__}: {error}") from error
        return _answer(response.status, data)

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        """The object, or None where there is none."""
        try:
            return await self.request("GET", path_of(kind, namespace, name))
        except ApiError as error:
            if error.code == 404:
                return None
            raise

    async def list(self, kind: str, namespace: str | None, selector: str = "") -> list[dict[str, Any]]:
        """All objects of a kind, read from the store itself and not from a cache that may lag."""
        query = {"labelSelector": selector} if selector else {}
        answer = await self.request("GET", path_of(kind, namespace), query=query)
        return list(answer.get("items", []))

    async def watch(self, path: str, version: str) -> AsyncIterator[dict[str, Any]]:
        """What changes in a collection after `version`, until the server ends the watch: `type` and `object`.

        Raises:
            ApiError: also for an error that comes as an event; 410 means to list again.
            Unavailable: the connection broke.
        """
        query = {"watch": "true", "resourceVersion": version, "timeoutSeconds": str(WATCH_S)}
        query["allowWatchBookmarks"] = "true"
        try:
            prepared = await self._client.param_serialize(
                "GET", path, query_params=list(query.items()), header_params={"Accept": "application/json"},
                auth_settings=["BearerToken"],
            )  # fmt: skip
            answer = await self._client.call_api(*prepared, _request_timeout=WATCH_TIMEOUT_S)
            if answer.status >= 400:
                _answer(answer.status, await answer.read())
            try:
                async for event in _events(answer.response.content):
                    yield event
            finally:
                answer.response.close()
        except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as error:
            raise Unavailable(f"watch {path}: {type(error).__name__}: {error}") from error


async def _events(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    buffer = b""
    async for chunk in content.iter_any():
        *lines, buffer = (buffer + chunk).split(b"\n")
        for line in lines:
            event = json.loads(line)
            if event["type"] == "ERROR":
                told = event["object"]
                raise ApiError(int(told.get("code", 500)), told.get("reason", ""), told.get("message", ""))
            yield event


def _answer(status: int, data: bytes) -> dict[str, Any]:
    try:
        answer = json.loads(data) if data else {}
    except ValueError:
        answer = {"message": data[:200].decode(errors="replace")}
    if status >= 400:
        raise ApiError(status, answer.get("reason", ""), answer.get("message", ""))
    return dict(answer)
