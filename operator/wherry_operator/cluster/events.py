"""Kubernetes Events: one object for what is the same, counted, at most once a minute."""

import time
from collections import OrderedDict
from datetime import UTC, datetime
from typing import Any

from wherry_operator.api.resource import LLMDeployment
from wherry_operator.api.v1alpha1 import API_VERSION, KIND
from wherry_operator.cluster.client import MERGE, Api, ApiError, Unavailable, path_of
from wherry_operator.desired.common import MANAGER, digest

REPEAT_AFTER_S = 60.0
REMEMBERED = 2000
MAX_MESSAGE = 1000


class EventRecorder:
    """Posts events about LLMDeployments. Events are a courtesy: one that cannot be posted is dropped."""

    def __init__(self, api: Api) -> None:
        self._api = api
        self._posted: OrderedDict[str, float] = OrderedDict()

    async def post(self, owner: LLMDeployment, kind: str, reason: str, message: str) -> None:
        """`kind` is Normal or Warning; `reason` one word in CamelCase."""
        message = message[:MAX_MESSAGE]
        key = digest([owner.uid, kind, reason, message], 16)
        now = time.monotonic()
        if now - self._posted.get(key, -REPEAT_AFTER_S) < REPEAT_AFTER_S:
            return
        self._posted[key] = now
        self._posted.move_to_end(key)
        while len(self._posted) > REMEMBERED:
            self._posted.popitem(last=False)
        try:
            await self._write(owner, f"{owner.name}.{key}", kind, reason, message)
        except (ApiError, Unavailable):
            self._posted.pop(key, None)

    async def _write(self, owner: LLMDeployment, name: str, kind: str, reason: str, message: str) -> None:
        stamp = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        body: dict[str, Any] = {
            "apiVersion": "v1",
            "kind": "Event",
            "metadata": {"name": name, "namespace": owner.namespace},
            "involvedObject": {
                "apiVersion": API_VERSION,
                "kind": KIND,
                "name": owner.name,
                "namespace": owner.namespace,
                "uid": owner.uid,
            },
            "type": kind,
            "reason": reason,
            "message": message,
            "source": {"component": MANAGER},
            "reportingComponent": MANAGER,
            "firstTimestamp": stamp,
            "lastTimestamp": stamp,
            "count": 1,
        }
        try:
            await self._api.request("POST", path_of("Event", owner.namespace), body=body)
        except ApiError as error:
            if error.code != 409:
                raise
            path = path_of("Event", owner.namespace, name)
            old = await self._api.request("GET", path)
            patch = {"count": (old.get("count") or 1) + 1, "lastTimestamp": stamp}
            await self._api.request("PATCH", path, body=patch, content_type=MERGE)
