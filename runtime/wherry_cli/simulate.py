"""`wherry simulate`: workers without a model, to study routing with many replicas on one machine."""

import asyncio
import contextlib
import json
import os
import sys
from collections.abc import Awaitable, Callable
from socket import socket
from typing import Annotated, Literal

import msgspec
import typer
import uvloop
from prometheus_client import CollectorRegistry
from rich.console import Console

from wherry_cli.engine_backend import EngineBackend
from wherry_cli.simulated_engine import SimulatedEngine
from wherry_cli.simulated_model import Costs, Shape
from wherry_protocol.http.asgi import App
from wherry_protocol.http.logs import set_up
from wherry_protocol.http.server import AddressError, bind, serve, stop_on_signals, url_of
from wherry_router.app import RouterApp
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


class _Settings(msgspec.Struct, kw_only=True):
    model: str
    api: Api
    token: str | None
    shape: Shape
    costs: Costs
    tokens_per_event: int
    drain_timeout_s: float


def _worker(settings: _Settings, engine: SimulatedEngine, lifecycle: Lifecycle) -> tuple[App, Drain]:
    async def drain() -> None:
        await lifecycle.drain(settings.drain_timeout_s, engine)

    return WorkerApp(engine, settings.model, settings.token, lifecycle), drain


def _openai(settings: _Settings, engine: SimulatedEngine) -> tuple[App, Drain]:
    registry = CollectorRegistry()
    registry.register(LoadCollector(settings.model, engine.load))
    metrics = RouterMetrics(registry)
    limits = Limits(max_concurrent=settings.shape.max_running + settings.shape.max_queued + 1)
    app = RouterApp(EngineBackend(engine), settings.model, limits, metrics, registry, settings.token)

    async def drain() -> float:
        return await app.drain(settings.drain_timeout_s, 0)

    return app, drain


async def _replica(settings: _Settings, sock: socket, stop: asyncio.Event) -> None:
    engine = SimulatedEngine(settings.model, settings.shape, settings.costs, settings.tokens_per_event)
    lifecycle = Lifecycle()
    await lifecycle.load(engine)
    app, drain = _worker(settings, engine, lifecycle) if settings.api == "worker" else _openai(settings, engine)

    async def stop_with_the_others() -> None:
        await stop.wait()
        lifecycle.stop.set()

    stopping = asyncio.create_task(stop_with_the_others())
    try:
        await serve(app, [sock], lifecycle.stop, drain)
    finally:
        stopping.cancel()
        await engine.close()


async def _run(settings: _Settings, sockets: list[socket]) -> None:
    stop = asyncio.Event()
    stop_on_signals(stop)
    for number, sock in enumerate(sockets):
        sys.stdout.write(json.dumps({"replica": number, "url": url_of(sock)}) + "\n")
    sys.stdout.flush()
    await asyncio.gather(*(_replica(settings, sock, stop) for sock in sockets))


def _bind(host: str, port: int, replicas: int) -> list[socket]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(bind(host, port + number if port else 0)) for number in range(replicas)]
        stack.pop_all()
    return sockets


def _check(shape: Shape) -> None:
    if shape.max_itl_ratio and shape.max_itl_ratio < 1:
        raise SettingsError("--max-itl-ratio is at least 1, or 0 for no limit")
    if shape.kv_tokens < shape.block_size:
        raise SettingsError(f"--kv-tokens={shape.kv_tokens} is not one block of --block-size={shape.block_size}")


def _token(api: Api, host: str) -> str | None:
    return worker_token(host) if api == "worker" else os.environ.get(ENV_API_KEY)


def _greet(settings: _Settings, sockets: list[socket]) -> None:
    urls = ",".join(url_of(sock) for sock in sockets)
    what = "the worker API" if settings.api == "worker" else "the OpenAI API"
    _console.print(f"{len(sockets)} simulated replicas of [bold]{settings.model}[/] speak {what}. Ctrl-C stops them.")
    if settings.api == "worker":
        _console.print("A router in front of them:")
        _console.print(f"  wherry-router --model {settings.model} --endpoints {urls}", soft_wrap=True, markup=False)


def app(
    replicas: Annotated[int, typer.Option(help="Workers in this process, one port each.", min=1, max=1000)] = 1,
    port: Annotated[int, typer.Option(help="Port of the first; the others follow. 0: free ones.", min=0)] = 9000,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    model: Annotated[str, typer.Option(help="Name that clients ask for.")] = "chat",
    api: Annotated[
        Api, typer.Option(help="worker: what Wherry's router speaks; openai: what other routers stand in front of.")
    ] = "worker",
    speed: Annotated[
        float, typer.Option(help="How many times as fast as the device; below 1, larger simulations fit.", min=0.001)
    ] = 1.0,
    tokens_per_event: Annotated[
        int, typer.Option(help="Tokens told together, after the first: fewer events cost less.", min=1)
    ] = 1,
    step_ms: Annotated[float, typer.Option(help="Milliseconds of any step.", min=0)] = _COSTS.step * 1e3,
    decode_ms: Annotated[
        float, typer.Option(help="Milliseconds more for each answer that gets a token.", min=0)
    ] = _COSTS.decode * 1e3,
    context_us: Annotated[
        float, typer.Option(help="Microseconds more for each token that these attend to.", min=0)
    ] = _COSTS.context * 1e6,
    prefill_ms: Annotated[
        float, typer.Option(help="Milliseconds more for each prompt token that is not cached.", min=0)
    ] = _COSTS.prefill * 1e3,
    max_running: Annotated[int, typer.Option(help="Requests in a batch at most.", min=1)] = _SHAPE.max_running,
    max_queued: Annotated[
        int, typer.Option(help="Requests that may wait; over it the answer is 429.", min=0)
    ] = _SHAPE.max_queued,
    max_batched_tokens: Annotated[
        int, typer.Option(help="Tokens in one step at most; longer prompts are chunked.", min=1)
    ] = _SHAPE.max_batched_tokens,
    max_itl_ratio: Annotated[
        float,
        typer.Option(help="How many times as long answers may wait for a token while prompts come in; 0: no limit."),
    ] = _SHAPE.max_itl_ratio,
    max_model_len: Annotated[
        int, typer.Option(help="Tokens of prompt and answer together.", min=2)
    ] = _SHAPE.max_model_len,
    kv_tokens: Annotated[int, typer.Option(help="Tokens that the KV cache holds.", min=1)] = _SHAPE.kv_tokens,
    block_size: Annotated[int, typer.Option(help="Tokens in a KV cache block.", min=1)] = _SHAPE.block_size,
    prefix_cache: Annotated[bool, typer.Option(help="Reuse the KV cache of equal prefixes.")] = True,
    answer_tokens: Annotated[
        float, typer.Option(help="Mean length of answers that nothing ends sooner.", min=1)
    ] = _SHAPE.answer_tokens,
    drain_timeout_s: Annotated[float, typer.Option(help="Seconds that answers get to finish.", min=0)] = 5,
) -> None:
    """Run workers without a model: they batch, queue, cache and take time like engines on GPUs, and answer with noise.

    Prints a line of JSON with the address of each replica. The defaults resemble a model of 8B parameters on one GPU.
    """
    set_up(level=30)
    try:
        shape = Shape(
            max_running=max_running,
            max_queued=max_queued,
            max_batched_tokens=max_batched_tokens,
            max_itl_ratio=max_itl_ratio,
            max_model_len=max_model_len,
            kv_tokens=kv_tokens,
            block_size=block_size,
            prefix_cache=prefix_cache,
            answer_tokens=answer_tokens,
        )
        _check(shape)
        costs = Costs(step=step_ms / 1e3, decode=decode_ms / 1e3, context=context_us / 1e6, prefill=prefill_ms / 1e3)
        settings = _Settings(
            model=model,
            api=api,
            token=_token(api, host),
            shape=shape,
            costs=costs.scaled(speed),
            tokens_per_event=tokens_per_event,
            drain_timeout_s=drain_timeout_s,
        )
        sockets = _bind(host, port, replicas)
    except (AddressError, SettingsError) as error:
        sys.stderr.write(f"wherry simulate: {error}\n")
        raise typer.Exit(1) from None
    _greet(settings, sockets)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(settings, sockets))


if __name__ == "__main__":
    typer.run(app)
