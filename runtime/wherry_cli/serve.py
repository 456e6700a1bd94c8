"""`wherry serve`: one process, one model, the OpenAI API."""

import asyncio
import os
import re
import sys
from pathlib import Path
from socket import socket
from typing import Annotated, Any

import msgspec
import typer
import uvloop
from prometheus_client import CollectorRegistry
from rich.console import Console

from wherry_cli.download import download
from wherry_cli.engine_backend import EngineBackend
from wherry_cli.engine_flags import with_engine_flags
from wherry_protocol.engine_config import WORKER_ONLY, Dtype, EngineConfig
from wherry_protocol.http.auth import is_loopback
from wherry_protocol.http.logs import set_up
from wherry_protocol.http.server import AddressError, bind, serve, stop_on_signals, url_of
from wherry_router.app import OPEN_PATHS, RouterApp
from wherry_router.identity.gate import Gate
from wherry_router.metrics import RouterMetrics
from wherry_router.settings import Limits
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.locate import locate
from wherry_runtime.server.metrics import LoadCollector
from wherry_runtime.server.surface import Engine
from wherry_runtime.sources.registry import is_remote
from wherry_runtime.sources.store import cache_root

ENV_API_KEY = "WHERRY_API_KEY"
_console = Console(stderr=True, highlight=False)
_Model = Annotated[
    str,
    typer.Argument(
        help="A model's directory or GGUF file, sample://tiny, or what is downloaded: hf://ORG/NAME, s3://…, "
        "https://…#sha256=…, oci://…."
    ),
]
_DEFAULTS = {field.name: field.default for field in msgspec.structs.fields(EngineConfig)}


class Failure(Exception):
    """Something the user can mend. The message says what and how."""


def model_uri(model: str, cache: str = "") -> str:
    """A directory, a .gguf file or a URI as a URI that leads to one here, downloaded to `cache` where it must be.

    Done before torch is loaded, which takes seconds.

    Raises:
        Failure: it is not there, is no model, or cannot be downloaded.
    """
    try:
        if is_remote(model):
            return download(model, cache_root(cache))
        if "://" not in model:
            path = Path(model).expanduser().resolve()
            if not path.exists():
                hint = "name a model's directory or GGUF file, or sample://tiny to try the sample"
                raise Failure(f"there is no directory {path}; {hint}")
            model = path.as_uri()
        locate(model)
    except ModelError as error:
        raise Failure(error.message) from None
    return model


def default_name(model: str) -> str:
    """What clients ask for where nothing else was said: the last part of the name, without revision or checksum."""
    name = model.partition("#")[0].partition("?")[0].rstrip("/")
    if model.startswith(("hf://", "oci://")):
        name = re.sub(r"(?<=[^/])[@:][^/]*(?=/|$)", "", name.partition("://")[2])
    return name.rpartition("/")[2]


async def _load(engine: Engine, name: str) -> None:
    with _console.status(f"Loading {name} …"):
        try:
            await engine.start()
        except ModelError as error:
            raise Failure(error.message) from None


def _greet(url: str, name: str, *, embeds: bool) -> None:
    body = f'{{"model": "{name}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    path = "chat/completions"
    if embeds:
        path, body = "embeddings", f'{{"model": "{name}", "input": ["Hello!"]}}'
    _console.print(f"[bold]{name}[/] is served at [bold]{url}/v1[/] (API description: {url}/docs)")
    _console.print("Try it:")
    _console.print(f"  curl {url}/v1/{path} -d '{body}'", soft_wrap=True, markup=False)
    if not embeds:
        _console.print(f"  wherry chat --url {url}", soft_wrap=True)
    _console.print("Ctrl-C stops it.")


async def _serve(config: EngineConfig, sock: socket) -> None:
    from wherry_runtime.engine.model_engine import ModelEngine

    engine = ModelEngine(config)
    await _load(engine, config.model_name)
    registry = CollectorRegistry()
    registry.register(LoadCollector(config.model_name, engine.load))
    app = RouterApp(
        EngineBackend(engine),
        config.model_name,
        Limits(),
        RouterMetrics(registry),
        registry,
        Gate(OPEN_PATHS, os.environ.get(ENV_API_KEY)),
    )
    stop = asyncio.Event()
    stop_on_signals(stop)
    _greet(url_of(sock), config.model_name, embeds=engine.embeds)

    async def drain() -> None:
        _console.print("Stopping once the running answers are done; Ctrl-C again stops at once.")
        await app.drain(config.drain_timeout_s, 0)

    try:
        await serve(app, [sock], stop, drain)
    finally:
        await engine.close()


def _run(config: EngineConfig) -> None:
    if not is_loopback(config.host) and not os.environ.get(ENV_API_KEY):
        _console.print(f"[yellow]Whoever reaches {config.host} can use this; set {ENV_API_KEY} to ask for a key.[/]")
    sock = bind(config.host, config.port)
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_serve(config, sock))


@with_engine_flags("model_uri", *WORKER_ONLY)
def app(
    model: _Model,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on; 0 picks a free one.", min=0, max=65535)] = 8080,
    model_name: Annotated[str, typer.Option(help="Name that clients ask for; default: the directory's.")] = "",
    dtype: Annotated[Dtype, typer.Option(help="Type of weights and activations.")] = "auto",
    max_model_len: Annotated[
        int, typer.Option(help="Tokens of prompt and answer together; 0: the model's own.", min=0)
    ] = _DEFAULTS["max_model_len"],
    max_running: Annotated[int, typer.Option(help="Requests in a batch at most.", min=1)] = _DEFAULTS["max_running"],
    max_batched_tokens: Annotated[
        int, typer.Option(help="Tokens in one step at most; longer prompts are chunked.", min=1)
    ] = _DEFAULTS["max_batched_tokens"],
    max_itl_ratio: Annotated[
        float,
        typer.Option(
            help="How many times as long running answers may wait for a token while prompts come in; 0: no limit.",
            min=0,
        ),
    ] = _DEFAULTS["max_itl_ratio"],
    max_queued: Annotated[
        int, typer.Option(help="Requests that may wait; over it the answer is 429.", min=0)
    ] = _DEFAULTS["max_queued"],
    kv_cache_bytes: Annotated[
        int, typer.Option(help="Memory for the KV cache; 0: sized from the memory there is.", min=0)
    ] = _DEFAULTS["kv_cache_bytes"],
    prefix_cache: Annotated[bool, typer.Option(help="Reuse the KV cache of equal prefixes.")] = True,
    threads: Annotated[int, typer.Option(help="CPU threads; 0: what the machine allows.", min=0)] = _DEFAULTS[
        "threads"
    ],
    drain_timeout_s: Annotated[int, typer.Option(help="Seconds that answers get to finish after Ctrl-C.", min=0)] = 30,
    **settings: Any,
) -> None:
    """Serve one model over the OpenAI API, in this process."""
    set_up(level=30, for_people=True)
    try:
        _run(
            EngineConfig(
                model_name=model_name or default_name(model),
                model_uri=model_uri(model, settings.get("model_cache", "")),
                host=host,
                port=port,
                dtype=dtype,
                max_model_len=max_model_len,
                max_running=max_running,
                max_batched_tokens=max_batched_tokens,
                max_itl_ratio=max_itl_ratio,
                max_queued=max_queued,
                kv_cache_bytes=kv_cache_bytes,
                prefix_cache=prefix_cache,
                threads=threads,
                drain_timeout_s=drain_timeout_s,
                **settings,
            )
        )
    except (Failure, AddressError) as error:
        sys.stderr.write(f"wherry serve: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
