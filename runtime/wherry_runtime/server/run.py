"""Runs a worker: listens at once, loads the model meanwhile, drains on SIGTERM."""

import asyncio
import logging
import os
import socket
from pathlib import Path
from typing import NamedTuple

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.http.auth import is_loopback
from wherry_protocol.http.mutual_tls import MutualTls
from wherry_protocol.http.server import bind, serve, stop_on_signals, url_of
from wherry_protocol.naming import ENV_WORKER_TOKEN
from wherry_runtime.server.app import WorkerApp
from wherry_runtime.server.lifecycle import EXIT_MODEL, Lifecycle
from wherry_runtime.server.probes import ProbeApp
from wherry_runtime.server.surface import Engine
from wherry_runtime.sources.progress import Download

log = logging.getLogger("wherry.worker")


class SettingsError(Exception):
    """The worker must not start like this. The message says what to set."""


def worker_token(host: str) -> str | None:
    """The token from the environment.

    Raises:
        SettingsError: there is none although others than this machine could connect.
    """
    token = os.environ.get(ENV_WORKER_TOKEN) or None
    if token is None and not is_loopback(host):
        raise SettingsError(
            f"--host={host} can be reached from outside and {ENV_WORKER_TOKEN} is not set; "
            f"set {ENV_WORKER_TOKEN} to a secret, or use --host=127.0.0.1"
        )
    return token


async def _load(engine: Engine, lifecycle: Lifecycle) -> int:
    if await lifecycle.load(engine):
        return 0
    lifecycle.stop.set()
    return EXIT_MODEL


async def _measure(engine: Engine, lifecycle: Lifecycle, loading: "asyncio.Task[int]") -> None:
    if await asyncio.shield(loading) == 0:
        await lifecycle.measure(engine)


class Listening(NamedTuple):
    """Where a worker listens: the worker API, with TLS where `tls` says so, and `probes` in the plain."""

    sock: socket.socket
    probes: socket.socket | None = None
    tls: MutualTls | None = None


def listen(config: EngineConfig) -> Listening:
    """Takes the ports.

    Raises:
        SettingsError: settings do not fit together.
        AddressError: a port cannot be had.
        TlsError: the certificate cannot be used.
    """
    if bool(config.worker_tls) != bool(config.worker_tls_name):
        raise SettingsError("--worker-tls and --worker-tls-name go together")
    tls = MutualTls(Path(config.worker_tls), config.worker_tls_name) if config.worker_tls else None
    sock = bind(config.host, config.port)
    return Listening(sock, bind(config.host, config.probe_port) if config.probe_port else None, tls)


async def _no_drain() -> None:
    pass


async def _serve(engine: Engine, config: EngineConfig, where: Listening, token: str | None, life: Lifecycle) -> None:
    """Serves the worker API until it has drained, and probes and the certificate's followers as long."""
    ended, tls = asyncio.Event(), where.tls
    beside = []
    if tls is not None:
        beside.append(asyncio.create_task(tls.watched.run()))
    probing = None
    if where.probes is not None:
        probing = asyncio.create_task(serve(ProbeApp(engine, life), [where.probes], ended, _no_drain))
    app = WorkerApp(engine, config.model_name, token, life, tls)
    url = url_of(where.sock, "http" if tls is None else "https")
    log.info("listening", extra={"fields": {"url": url, "model": config.model_name}})
    context = None if tls is None else tls.listener
    await serve(app, [where.sock], life.stop, lambda: life.drain(config.drain_timeout_s, engine), context)
    ended.set()
    for task in beside:
        task.cancel()
    if probing is not None:
        await probing


async def run(
    engine: Engine, config: EngineConfig, where: Listening, token: str | None, download: Download | None = None
) -> int:
    """Serves `engine` until SIGTERM. The exit status: 0, or 1 where the model cannot be loaded.

    Args:
        download: how far the engine is with downloading its model.
    """
    lifecycle = Lifecycle(download)
    stop_on_signals(lifecycle.stop)
    loading = asyncio.create_task(_load(engine, lifecycle))
    measuring = asyncio.create_task(_measure(engine, lifecycle, loading)) if config.measure_quality else None
    await _serve(engine, config, where, token, lifecycle)
    if measuring is not None:
        measuring.cancel()
        await asyncio.gather(measuring, return_exceptions=True)
    if not loading.done():
        # The thread that loads, or waits for the group's other ranks, cannot be interrupted, and an orderly end would
        # wait for it.
        log.info("stopped while loading")
        logging.shutdown()
        os._exit(0)
    await engine.close()
    return loading.result()
