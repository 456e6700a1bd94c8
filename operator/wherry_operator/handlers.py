"""The watches. kopf lists and watches, reconnects and re-authenticates; its events do no more here than name a key.

No progress is kept on objects: there is none to keep, because every look at an LLMDeployment starts from what is.
"""

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import kopf
from kubernetes.aio import client

from wherry_operator.api.v1alpha1 import GROUP, PLURAL, VERSION
from wherry_operator.cluster.reconcile import Key
from wherry_operator.desired.common import MANAGER
from wherry_protocol import naming

CHILDREN = (("", "v1", "pods"), ("", "v1", "services"), ("apps", "v1", "deployments"))
OURS = f"{naming.LABEL_MANAGED_BY}={MANAGER}"


class Forever(Iterable[float]):
    """Waits between tries that never run out: an API server that is away must not end the operator."""

    def __iter__(self) -> Iterator[float]:
        yield from (0.2, 0.5, 1.0, 2.0)
        while True:
            yield 5.0


def registry(enqueue: Callable[[Key], None], connect: Callable[[], Any]) -> kopf.OperatorRegistry:
    """The handlers. `connect` gives the client configuration to log in with, and is asked again when it expires."""
    handlers = kopf.OperatorRegistry()

    @kopf.on.login(registry=handlers)
    async def login(**_: Any) -> kopf.ConnectionInfo:
        return await connection(await connect())

    @kopf.on.event(GROUP, VERSION, PLURAL, registry=handlers)  # type: ignore[arg-type]
    async def resource_seen(namespace: str, name: str, **_: Any) -> None:
        enqueue(Key(namespace, name))

    async def child_seen(namespace: str, labels: dict[str, str], **_: Any) -> None:
        if owner := labels.get(naming.LABEL_DEPLOYMENT):
            enqueue(Key(namespace, owner))

    for group, version, plural in CHILDREN:
        kopf.on.event(group, version, plural, registry=handlers, id=f"{plural}_seen")(child_seen)  # type: ignore[arg-type]
    return handlers


async def connection(settings: client.Configuration) -> kopf.ConnectionInfo:
    """kopf's credentials from the Kubernetes client's, so that there is one way to configure both."""
    header = (await settings.auth_settings()).get("BearerToken", {}).get("value", "")
    scheme, _, token = header.partition(" ")
    return kopf.ConnectionInfo(
        server=settings.host,
        ca_path=settings.ssl_ca_cert,
        insecure=not settings.verify_ssl,
        token=token or None,
        scheme=scheme if token else None,
        certificate_path=settings.cert_file,
        private_key_path=settings.key_file,
    )


def operator_settings() -> kopf.OperatorSettings:
    """Only what Wherry makes is watched; kopf posts no events and looks for no new kinds."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.scanning.disabled = True
    settings.networking.error_backoffs = Forever()
    settings.networking.connect_timeout = 5
    settings.networking.request_timeout = 30
    settings.watching.server_timeout = 240
    settings.watching.inactivity_timeout = 90
    settings.watching.reconnect_backoff = 0.5
    for group, version, plural in CHILDREN:
        settings.watching.label_selectors[group, version, plural] = OURS
    return settings


class Watcher:
    """Runs kopf in a thread and an event loop of its own: kopf ends every task of its loop when it ends."""

    def __init__(self, enqueue: Callable[[Key], None], connect: Callable[[], Any], namespaces: Sequence[str]) -> None:
        self._loop = asyncio.get_running_loop()
        self._enqueue = enqueue
        self._connect = connect
        self._namespaces = list(namespaces)
        self._stop = threading.Event()
        self._ended: asyncio.Future[None] = self._loop.create_future()
        self._thread = threading.Thread(target=self._run, name="watches", daemon=True)

    async def run(self) -> None:
        """Watches until cancelled.

        Raises:
            RuntimeError: kopf gave up, which it should never do.
        """
        self._thread.start()
        try:
            await asyncio.shield(self._ended)
        finally:
            self._stop.set()

    def _run(self) -> None:
        failure: BaseException = RuntimeError("the watches ended")
        try:
            asyncio.run(self._watch())
        except Exception as error:
            failure = error
        self._tell(self._fail, failure)

    async def _watch(self) -> None:
        await kopf.operator(
            registry=registry(lambda key: self._tell(self._enqueue, key), self._connect),
            settings=operator_settings(),
            standalone=True,
            clusterwide=not self._namespaces,
            namespaces=self._namespaces,
            stop_flag=self._stop,
        )

    def _fail(self, failure: BaseException) -> None:
        if not self._ended.done() and not self._stop.is_set():
            self._ended.set_exception(failure)

    def _tell(self, function: Callable[[Any], None], argument: Any) -> None:
        # The main loop is closed when the process is about to end.
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(function, argument)
