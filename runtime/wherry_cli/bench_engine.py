"""Measures an engine through `AsyncEngine`, as a server uses it."""

import asyncio
import json
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wherry_cli import bench_machine
from wherry_cli.bench_flags import Failure
from wherry_cli.bench_times import Stream, percentiles, steady
from wherry_cli.serve import Failure as ModelFailure
from wherry_cli.serve import model_uri
from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.worker import ErrorEvent, ExecuteRequest, Prompt, SamplingParams, Token
from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.engine.resources import cpu_threads
from wherry_runtime.kernels.cpu.model import NativeModel
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.locate import locate
from wherry_runtime.models.registry import read_config

NAME = "bench"


class Spread(msgspec.Struct, frozen=True):
    """Lowest, middle and highest of some runs."""

    low: float
    median: float
    high: float

    @staticmethod
    def of(values: list[float]) -> "Spread":
        return Spread(min(values), statistics.median(values), max(values))


class Prefill(msgspec.Struct, frozen=True):
    """One prompt alone: seconds to its first token, prompt tokens per second."""

    prompt_tokens: int
    seconds: Spread
    rate: Spread


class Decode(msgspec.Struct, frozen=True):
    """`batch` requests at a time: tokens per second of all together, seconds between tokens of one (percentiles), and
    the bytes that their steps read over the bytes that memory could give."""

    batch: int
    rate: Spread
    gap_s: dict[str, float]
    bandwidth_share: Spread


class Memory(msgspec.Struct, frozen=True):
    """Bytes. `beyond` is what the process holds beside weights and KV cache, `before` what it held before loading."""

    weights: int
    kv_cache: int
    process: dict[str, int]
    before: dict[str, int]
    beyond: int
    beyond_share: float


class Report(msgspec.Struct, frozen=True):
    """A whole measurement. `read_per_step` are the bytes of weights that a decode step has to read."""

    model: str
    settings: dict[str, Any]
    parameters: int
    dtype: str
    machine: dict[str, Any]
    bandwidth: float
    read_per_step: int
    load_s: float
    prefill: list[Prefill]
    decode: list[Decode]
    memory: Memory
    notes: list[str]


@dataclass(frozen=True)
class Plan:
    """What to measure. `settings` are EngineConfig's."""

    model: str
    batches: list[int]
    prompt_tokens: list[int]
    context: int
    new_tokens: int
    runs: int
    settings: dict[str, Any] = field(default_factory=dict)

    def config(self, model: ModelConfig, uri: str) -> EngineConfig:
        """The engine's settings, context and KV cache no larger than the measurement needs."""
        settings = dict(self.settings)
        if not settings.get("max_model_len"):
            longest = max(self.context + self.new_tokens, max(self.prompt_tokens) + 1)
            settings["max_model_len"] = min(longest, model.max_position_embeddings)
        if not settings.get("kv_cache_bytes"):
            dtype = settings.get("dtype", "auto")
            size = 2 if (model.dtype if dtype == "auto" else dtype) == "bfloat16" else 4
            per_token = model.num_layers * 2 * model.num_kv_heads * model.head_dim * size
            decode = max(self.batches) * (self.context + self.new_tokens + settings.get("block_size", 16))
            settings["kv_cache_bytes"] = per_token * (max(decode, *self.prompt_tokens) + 512)
        return EngineConfig(model_name=NAME, model_uri=uri, max_running=max(self.batches), **settings)


class Meter:
    """Sends requests to an engine and takes the times."""

    def __init__(self, engine: AsyncEngine, vocab_size: int) -> None:
        self._engine = engine
        self._draw = random.Random(0)  # noqa: S311 - reproducible, not secret
        self._vocab_size = vocab_size
        self._sent = 0

    async def stream(self, prompt: list[int], new_tokens: int) -> Stream:
        """One request, greedy, to its last token."""
        self._sent += 1
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0, ignore_eos=True)
        request = ExecuteRequest(
            id=f"bench-{self._sent}", model=NAME, prompt=Prompt(token_ids=prompt), sampling=sampling
        )
        stream = Stream(time.perf_counter())
        async for event in self._engine.generate(request):
            if isinstance(event, Token):
                stream.tokens += [time.perf_counter()] * len(event.ids)
            elif isinstance(event, ErrorEvent):
                raise Failure(f"the engine failed: {event.message}")
        return stream

    def prompt(self, length: int) -> list[int]:
        """Random tokens, never the same ones."""
        return [self._draw.randrange(3, self._vocab_size) for _ in range(length)]

    async def first_token(self, length: int) -> float:
        """Seconds from a prompt of `length` tokens to its first token."""
        stream = await self.stream(self.prompt(length), 1)
        return stream.tokens[0] - stream.sent

    async def together(self, batch: int, context: int, new_tokens: int) -> list[Stream]:
        """`batch` requests at the same time."""
        prompts = [self.prompt(context) for _ in range(batch)]
        return list(await asyncio.gather(*(self.stream(p, new_tokens) for p in prompts)))


def held(engine: AsyncEngine) -> tuple[int, int, int]:
    """Bytes of weights, of the KV cache, and of the weights that a decode step reads.

    A step looks up rows of the embedding; it reads all of it only where the head is the same memory.
    """
    loaded = engine._ready()
    config, cache = loaded.model_config, bench_machine.tensor_spans(loaded.runner.cache)
    weights = bench_machine.covered(bench_machine.tensor_spans(loaded.runner.model), cache)
    weights -= getattr(loaded.runner.model, "workspace_bytes", 0)  # the native backend's buffers
    plain = loaded.num_parameters * loaded.dtype.itemsize
    table = config.vocab_size * config.hidden_size * loaded.dtype.itemsize
    quantized = getattr(engine._config, "quantization", "none") != "none"
    shared = config.tie_word_embeddings and not quantized and weights < plain + table // 2
    return weights, bench_machine.covered(cache), weights - (0 if shared else table)


async def settled(engine: AsyncEngine) -> None:
    """Waits until weights are where they stay: steps take longer while they are read from the checkpoint's files."""
    model = engine._ready().runner.model
    if isinstance(model, NativeModel):
        await asyncio.to_thread(model.settling.done.wait)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[str], None]]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("measuring", total=total)

        def step(what: str) -> None:
            bar.update(task, advance=1, description=what)

        yield step


async def _measure(
    plan: Plan, meter: Meter, lengths: list[int], step: Callable[[str], None]
) -> tuple[dict[int, list[float]], dict[int, list[list[Stream]]]]:
    """Everything `runs` times, in turns, so that what disturbs the machine for a while hits all sizes alike."""
    first: dict[int, list[float]] = {n: [] for n in lengths}
    decoded: dict[int, list[list[Stream]]] = {b: [] for b in plan.batches}
    await meter.together(max(plan.batches), 8, 8)
    for number in range(plan.runs):
        for length in lengths:
            first[length].append(await meter.first_token(length))
            step(f"run {number + 1}: prompt of {length}")
        for batch in plan.batches:
            decoded[batch].append(await meter.together(batch, plan.context, plan.new_tokens))
            step(f"run {number + 1}: batch {batch}")
    return first, decoded


async def _run(plan: Plan, config: EngineConfig, model: ModelConfig) -> Report:
    engine = AsyncEngine(config)
    threads = config.threads or cpu_threads()
    bandwidth = await asyncio.to_thread(bench_machine.read_bandwidth, threads, torch.device("cpu"))
    bench_machine.forget_peak()
    before = bench_machine.resident()
    began = time.perf_counter()
    with Console(stderr=True).status(f"Loading {plan.model} …"):
        await engine.start()
    load_s = time.perf_counter() - began
    try:
        await settled(engine)
        device = torch.device(engine.device)
        if device.type == "cuda":
            bandwidth = await asyncio.to_thread(bench_machine.read_bandwidth, threads, device)
        lengths = [n for n in plan.prompt_tokens if n < engine.max_model_len]
        left_out = sorted(set(plan.prompt_tokens) - set(lengths))
        with _progress(plan.runs * (len(lengths) + len(plan.batches))) as step:
            first, decoded = await _measure(plan, Meter(engine, model.vocab_size), lengths, step)
        weights, cache, read = held(engine)
        process = bench_machine.resident()
        beyond = process["total"] - weights - cache
        kv_per_token = cache / engine.load().kv_tokens_total
        reads = {b: read + b * kv_per_token * (plan.context + plan.new_tokens / 2) for b in plan.batches}
        return Report(
            model=plan.model,
            settings={k: v for k, v in msgspec.to_builtins(config).items() if k not in ("model_name", "model_uri")},
            parameters=engine.num_parameters,
            dtype=engine.dtype,
            machine=bench_machine.describe(device, threads),
            bandwidth=bandwidth,
            read_per_step=read,
            load_s=load_s,
            prefill=[Prefill(n, Spread.of(s), Spread.of([n / t for t in s])) for n, s in first.items()],
            decode=[_decode(b, runs, reads[b] / b / bandwidth) for b, runs in decoded.items()],
            memory=Memory(weights, cache, process, before, beyond, beyond / (weights + cache)),
            notes=[f"prompts of {n} tokens do not fit into the context and were left out" for n in left_out],
        )
    finally:
        await engine.close()


def _decode(batch: int, runs: list[list[Stream]], share_per_rate: float) -> Decode:
    measured = [steady(streams) for streams in runs]
    rates = [rate for rate, _ in measured]
    gaps = [gap for _, run in measured for gap in run]
    return Decode(batch, Spread.of(rates), percentiles(gaps), Spread.of([r * share_per_rate for r in rates]))


def run(plan: Plan) -> Report:
    """Loads the model and measures.

    Raises:
        Failure: the model cannot be loaded, or does not fit what is asked for.
    """
    try:
        uri = model_uri(plan.model)
        model = read_config(locate(uri))
        config = plan.config(model, uri)
        if plan.context + plan.new_tokens > (config.max_model_len or model.max_position_embeddings):
            raise Failure("--context and --new-tokens together are more than the model's context")
        return asyncio.run(_run(plan, config, model))
    except ModelFailure as error:
        raise Failure(str(error)) from None
    except ModelError as error:
        raise Failure(error.message) from None


def read_report(file: Path) -> dict[str, Any]:
    """What `--json` wrote."""
    content: dict[str, Any] = json.loads(file.read_text())
    return content
