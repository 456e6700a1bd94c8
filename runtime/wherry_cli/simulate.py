"""`wherry simulate`: workers without a model, to study routing with many replicas on one machine."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from socket import socket
from typing import Annotated, Literal

import msgspec
import typer
import uvloop
from msgspec import Meta
from prometheus_client import CollectorRegistry
from rich.console import Console

from wherry_cli.engine_backend import EngineBackend
from wherry_cli.simulated_engine import SimulatedEngine
from wherry_cli.simulated_model import Costs, Shape
from wherry_cli.struct_flags import with_struct
from wherry_protocol.http.asgi import App
from wherry_protocol.http.logs import set_up
from wherry_protocol.http.mutual_tls import MutualTls
from wherry_protocol.http.server import AddressError, bind, serve, stop_on_signals, url_of
from wherry_protocol.http.tls import TlsError
from wherry_router.app import OPEN_PATHS, RouterApp
from wherry_router.identity.gate import Gate
from wherry_router.metrics import RouterMetrics
from wherry_router.settings import Limits
from wherry_runtime.server.app import WorkerApp
from wherry_runtime.server.lifecycle import Lifecycle
from wherry_runtime.server.metrics import LoadCollector
from wherry_runtime.server.run import SettingsError, worker_token

Api = Literal["worker", "openai"]
Drain = Callable[[], Awaitable[float | None]]
ENV_API_KEY = "WHERRY_API_KEY"

_SHAPE, _COSTS = Shape(), Costs()
_console = Console(stderr=True, highlight=False)


class Simulated(msgspec.Struct, kw_only=True):
    """The command's options."""

    replicas: Annotated[int, Meta(description="workers in this process, one port each", ge=1, le=1000)] = 1
    port: Annotated[int, Meta(description="port of the first; the others follow; 0: free ones", ge=0, le=65535)] = 9000
    host: Annotated[str, Meta(description="address to listen on")] = "127.0.0.1"
    model: Annotated[str, Meta(description="name that clients ask for")] = "chat"
    api: Annotated[
        Api, Meta(description="worker: what Wherry's router speaks; openai: what other routers stand in front of")
    ] = "worker"
    speed: Annotated[
        float, Meta(description="how many times as fast as the device; below 1, larger simulations fit", ge=0.001)
    ] = 1.0
    tokens_per_event: Annotated[
        int, Meta(description="tokens told together, after the first: fewer events cost less", ge=1)
    ] = 1
    step_ms: Annotated[float, Meta(description="milliseconds of any step", ge=0)] = _COSTS.step * 1e3
    decode_ms: Annotated[float, Meta(description="milliseconds more for each answer that gets a token", ge=0)] = (
        _COSTS.decode * 1e3
    )
    context_us: Annotated[float, Meta(description="microseconds more for each token that these attend to", ge=0)] = (
        _COSTS.context * 1e6
    )
    prefill_ms: Annotated[
        float, Meta(description="milliseconds more for each prompt token that is not cached", ge=0)
    ] = _COSTS.prefill * 1e3
    max_running: Annotated[int, Meta(description="requests in a batch at most", ge=1)] = _SHAPE.max_running
    max_queued: Annotated[int, Meta(description="requests that may wait; over it the answer is 429", ge=0)] = (
        _SHAPE.max_queued
    )
    max_batched_tokens: Annotated[
        int, Meta(description="tokens in one step at most; longer prompts are chunked", ge=1)
    ] = _SHAPE.max_batched_tokens
    max_itl_ratio: Annotated[
        float,
        Meta(description="how many times as long answers may wait for a token while prompts come in; 0: no limit"),
    ] = _SHAPE.max_itl_ratio
    max_model_len: Annotated[int, Meta(description="tokens of prompt and answer together", ge=2)] = _SHAPE.max_model_len
    kv_tokens: Annotated[int, Meta(description="tokens that the KV cache holds", ge=1)] = _SHAPE.kv_tokens
    block_size: Annotated[int, Meta(description="tokens in a KV cache block", ge=1)] = _SHAPE.block_size
    prefix_cache: Annotated[bool, Meta(description="reuse the KV cache of equal prefixes")] = True
    answer_tokens: Annotated[float, Meta(description="mean length of answers that nothing ends sooner", ge=1)] = (
        _SHAPE.answer_tokens
    )
    drain_timeout_s: Annotated[float, Meta(description="seconds that answers get to finish after SIGTERM", ge=0)] = 5
    worker_tls: Annotated[
        str, Meta(description="directory with ca.crt, tls.crt and tls.key: mutual TLS, as real workers speak it")
    ] = ""
    worker_tls_name: Annotated[str, Meta(description="the DNS name in tls.crt; needed with --worker-tls")] = ""

    def shape(self) -> Shape:
        """The engine's limits.

        Raises:
            SettingsError: they do not go together.
        """
        if self.max_itl_ratio != 0 and not self.max_itl_ratio >= 1:
            raise SettingsError("--max-itl-ratio is at least 1, or 0 for no limit")
        if self.kv_tokens < self.block_size:
            raise SettingsError(f"--kv-tokens={self.kv_tokens} is not one block of --block-size={self.block_size}")
        return Shape(**{name: getattr(self, name) for name in Shape.__struct_fields__})

    def costs(self) -> Costs:
        """The device's, as fast as it is simulated."""
        full = Costs(
            step=self.step_ms / 1e3,
            decode=self.decode_ms / 1e3,
            context=self.context_us / 1e6,
            prefill=self.prefill_ms / 1e3,
        )
        return full.scaled(self.speed)


def _worker(settings: Simulated, token: str | None, engine: SimulatedEngine, lifecycle: Lifecycle) -> tuple[App, Drain]:
    async def drain() -> None:
        await lifecycle.drain(settings.drain_timeout_s, engine)

    return WorkerApp(engine, settings.model, token, lifecycle), drain


def _openai(settings: Simulated, token: str | None, engine: SimulatedEngine) -> tuple[App, Drain]:
    registry = CollectorRegistry()
    registry.register(LoadCollector(settings.model, engine.load))
    metrics = RouterMetrics(registry)
    limits = Limits(max_concurrent=settings.max_running + settings.max_queued + 1)
    app = RouterApp(EngineBackend(engine), settings.model, limits, metrics, registry, Gate(OPEN_PATHS, token))

    async def drain() -> float:
        return await app.drain(settings.drain_timeout_s, 0)

    return app, drain


async def _replica(
    settings: Simulated, token: str | None, sock: socket, stop: asyncio.Event, tls: MutualTls | None
) -> None:
    engine = SimulatedEngine(settings.model, settings.shape(), settings.costs(), settings.tokens_per_event)
    lifecycle = Lifecycle()
    await lifecycle.load(engine)
    if settings.api == "worker":
        app, drain = _worker(settings, token, engine, lifecycle)
    else:
        app, drain = _openai(settings, token, engine)

    async def stop_with_the_others() -> None:
        await stop.wait()
        lifecycle.stop.set()

    stopping = asyncio.create_task(stop_with_the_others())
    try:
        await serve(app, [sock], lifecycle.stop, drain, None if tls is None else tls.listener)
    finally:
        stopping.cancel()
        await engine.close()


async def _run(settings: Simulated, token: str | None, sockets: list[socket], tls: MutualTls | None) -> None:
    stop = asyncio.Event()
    stop_on_signals(stop)
    following = None if tls is None else asyncio.create_task(tls.watched.run())
    for number, sock in enumerate(sockets):
        sys.stdout.write(json.dumps({"replica": number, "url": url_of(sock, _scheme(settings))}) + "\n")
    sys.stdout.flush()
    await asyncio.gather(*(_replica(settings, token, sock, stop, tls) for sock in sockets))
    if following is not None:
        following.cancel()


def _scheme(settings: Simulated) -> str:
    return "https" if settings.worker_tls else "http"


def _tls(settings: Simulated) -> MutualTls | None:
    """What the flags ask for.

    Raises:
        SettingsError: they do not go together.
        TlsError: the files cannot be used.
    """
    if bool(settings.worker_tls) != bool(settings.worker_tls_name):
        raise SettingsError("--worker-tls and --worker-tls-name go together")
    if settings.worker_tls and settings.api != "worker":
        raise SettingsError("--worker-tls is for --api worker")
    return MutualTls(Path(settings.worker_tls), settings.worker_tls_name) if settings.worker_tls else None


def _bind(host: str, port: int, replicas: int) -> list[socket]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(bind(host, port + number if port else 0)) for number in range(replicas)]
        stack.pop_all()
    return sockets


def _token(api: Api, host: str) -> str | None:
    return worker_token(host) if api == "worker" else os.environ.get(ENV_API_KEY)


def _greet(settings: Simulated, sockets: list[socket]) -> None:
    urls = ",".join(url_of(sock, _scheme(settings)) for sock in sockets)
    what = "the worker API" if settings.api == "worker" else "the OpenAI API"
    _console.print(f"{len(sockets)} simulated replicas of [bold]{settings.model}[/] speak {what}. Ctrl-C stops them.")
    if settings.api == "worker":
        _console.print("A router in front of them:")
        secure = f" --worker-tls {settings.worker_tls} --worker-tls-name {settings.worker_tls_name}"
        command = f"  wherry-router --model {settings.model} --endpoints {urls}{secure if settings.worker_tls else ''}"
        _console.print(command, soft_wrap=True, markup=False)


@with_struct(Simulated)
def app(settings: Simulated) -> None:
    """Run workers without a model: they batch, queue, cache and take time like engines on GPUs, and answer with noise.

    Prints a line of JSON with the address of each replica. The defaults resemble a model of 8B parameters on one GPU.
    """
    set_up(level=30, for_people=True)
    try:
        settings.shape()
        token = _token(settings.api, settings.host)
        tls = _tls(settings)
        sockets = _bind(settings.host, settings.port, settings.replicas)
    except (AddressError, SettingsError, TlsError) as error:
        sys.stderr.write(f"wherry simulate: {error}\n")
        raise typer.Exit(1) from None
    _greet(settings, sockets)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings, token, sockets, tls))


if __name__ == "__main__":
    typer.run(app)
