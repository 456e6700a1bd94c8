"""Runs a worker: listens at once, loads the model meanwhile, drains on SIGTERM."""

import asyncio
import logging
import os
import socket

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.http.auth import is_loopback
from wherry_protocol.http.server import serve, stop_on_signals, url_of
from wherry_protocol.naming import ENV_WORKER_TOKEN
from wherry_runtime.server.app import WorkerApp
from wherry_runtime.server.lifecycle import EXIT_MODEL, Lifecycle
from wherry_runtime.server.surface import Engine

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


async def run(engine: Engine, config: EngineConfig, sock: socket.socket, token: str | None) -> int:
    """Serves `engine` on `sock` until SIGTERM. The exit status: 0, or 1 where the model cannot be loaded."""
    lifecycle = Lifecycle()
    stop_on_signals(lifecycle.stop)
    loading = asyncio.create_task(_load(engine, lifecycle))
    app = WorkerApp(engine, config.model_name, token, lifecycle)
    log.info("listening", extra={"fields": {"url": url_of(sock), "model": config.model_name}})
    await serve(app, [sock], lifecycle.stop, lambda: lifecycle.drain(config.drain_timeout_s, engine))
    if not loading.done():
        # The thread that loads, or waits for the group's other ranks, cannot be interrupted, and an orderly end would
        # wait for it.
        log.info("stopped while loading")
        logging.shutdown()
        os._exit(0)
    await engine.close()
    return loading.result()
