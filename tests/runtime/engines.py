"""Helpers: random models on disk, and engines that answer."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.worker import End, ErrorEvent, Event, ExecuteRequest, Prompt, SamplingParams, Started, Token
from wherry_runtime.engine.async_engine import AsyncEngine
from wherry_runtime.kvcache.paged import bytes_per_token
from wherry_runtime.loading.loader import DTYPES
from wherry_runtime.models.registry import read_config

CHECKOUT = Path(__file__).resolve().parents[2]
TINY = CHECKOUT / "examples" / "models" / "tiny"
VOCAB_SIZE = 320
# Settings of each backend; the native kernels have blocks of 16 tokens and multiples.
BACKENDS: dict[str, dict[str, Any]] = {
    "pytorch": {"backend": "pytorch", "block_size": 4},
    "native": {"backend": "native", "block_size": 16},
}
CHAT_TEMPLATE = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"


def save_byte_tokenizer(directory: Path, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A tokenizer with a token for each byte and a few special ones after them."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>", "<|user|>", "<|assistant|>"])
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"chat_template": chat_template} if chat_template is not None else {}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))


@dataclass
class Answered:
    """A finished answer, put together from its events."""

    events: list[Event]

    @property
    def ids(self) -> list[int]:
        return [i for e in self.events if isinstance(e, Token) for i in e.ids]

    @property
    def text(self) -> str:
        return "".join(e.text for e in self.events if isinstance(e, Token))

    @property
    def end(self) -> End:
        last = self.events[-1]
        assert isinstance(last, End), last
        return last

    @property
    def error(self) -> ErrorEvent:
        last = self.events[-1]
        assert isinstance(last, ErrorEvent), last
        return last

    @property
    def started(self) -> Started:
        first = self.events[0]
        assert isinstance(first, Started), first
        return first


def engine_config(directory: Path, *, kv_blocks: int = 0, kv_tokens: int = 0, **settings: Any) -> EngineConfig:
    """Small float32 settings; `kv_blocks` or `kv_tokens` sizes the cache."""
    defaults = {"model_name": "m", "dtype": "float32", "block_size": 4, "max_running": 8, "threads": 2}
    config = EngineConfig(model_uri=str(directory), **{**defaults, **settings})
    if size := kv_blocks * config.block_size + kv_tokens:
        native = config.backend == "native"
        per_token = bytes_per_token(read_config(directory), DTYPES[config.dtype], native=native)
        config = msgspec.structs.replace(config, kv_cache_bytes=per_token * size)
    return config


@asynccontextmanager
async def running(directory: Path, **settings: Any) -> AsyncIterator[AsyncEngine]:
    """A started engine, which must have freed everything by the end."""
    engine = AsyncEngine(engine_config(directory, **settings))
    await engine.start()
    try:
        yield engine
        await settled(engine)
        assert engine.load().kv_tokens_used == 0
        engine._core.scheduler.check_integrity()
    finally:
        await engine.close()


async def settled(engine: AsyncEngine, deadline_s: float = 20.0) -> None:
    """Waits until no request is live, and the last step with one is done."""
    async with asyncio.timeout(deadline_s):
        while (load := engine.load()).running or load.waiting or load.kv_tokens_used:  # noqa: ASYNC110 - the engine offers no event for it
            await asyncio.sleep(0.002)


async def ask(
    engine: AsyncEngine,
    prompt: Prompt | Sequence[int] | str,
    *,
    request_id: str = "r",
    priority: int = 0,
    **params: Any,
) -> Answered:
    """One whole answer."""
    if isinstance(prompt, str):
        prompt = Prompt(text=prompt)
    elif not isinstance(prompt, Prompt):
        prompt = Prompt(token_ids=list(prompt))
    request = ExecuteRequest(
        id=request_id, model="m", prompt=prompt, sampling=SamplingParams(**params), priority=priority
    )
    return Answered([event async for event in engine.generate(request)])


async def ask_all(engine: AsyncEngine, prompts: Sequence[Sequence[int] | str], **params: Any) -> list[Answered]:
    """Answers to all of `prompts` at once."""
    return await asyncio.gather(*(ask(engine, p, request_id=f"r{i}", **params) for i, p in enumerate(prompts)))
