"""Everything between an EngineConfig and an engine that can step: blocking work, done once."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.engine.core import new_scheduler_factory
from wherry_runtime.engine.part import Outline, Part
from wherry_runtime.engine.resources import Device
from wherry_runtime.engine.rng import NoiseCache, gumbel_noise
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.engine.speculative.setup import load_draft, new_speculator
from wherry_runtime.engine.speculative.speculator import Speculator
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.parallel.group import place as place_of
from wherry_runtime.parallel.lead import Leader, lead
from wherry_runtime.scheduling.scheduler import Scheduler
from wherry_runtime.tokenization.chat_template import ChatTemplate, find_template
from wherry_runtime.tokenization.tokenizer import Tokenizer

log = logging.getLogger(__name__)

SHORT_TEXT = 2000  # characters that are tokenized on the event loop: a thread would cost more


@dataclass(slots=True, frozen=True)
class Loaded:
    """A model that is ready to serve."""

    model_config: ModelConfig
    max_model_len: int
    kv_tokens: int
    dtype: torch.dtype
    device: Device
    num_parameters: int
    tokenizer: Tokenizer
    chat_template: ChatTemplate | None
    runner: ModelRunner
    new_scheduler: Callable[[], Scheduler]
    speculator: Speculator | None
    leader: Leader | None  # of the group, if there are several ranks

    async def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """Token ids of `text`, off the event loop if it is long."""
        if len(text) <= SHORT_TEXT:
            return self.tokenizer.encode(text, special_tokens=special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, special_tokens=special_tokens)


def load(config: EngineConfig) -> Loaded:
    """Loads the model and makes its KV cache, together with the group's other ranks if there are any.

    Raises:
        ModelError: why not.
    """
    outline = Outline.of(config, place_of(config))
    leader = lead(outline) if outline.place.shard.size > 1 else None
    try:
        return _load(outline.load(), leader)
    except BaseException:
        if leader is not None:
            leader.close()
        raise


def _load(part: Part, leader: Leader | None) -> Loaded:
    outline = part.outline
    config, model_config, wanted = outline.config, outline.model_config, outline.model_len
    tokenizer = Tokenizer(outline.directory)
    template = _chat_template(tokenizer, find_template(outline.directory, tokenizer.settings))
    draft = load_draft(config, model_config, tokenizer, wanted, outline.device.torch)
    beside = draft.bytes_per_token if draft is not None else 0
    if leader is None:
        num_blocks = part.num_blocks(beside)
        model = part.build(num_blocks)
    else:
        num_blocks, model = leader.build(part, beside)
    kv_tokens = num_blocks * config.block_size
    max_model_len = _fitting(config, wanted, kv_tokens)
    log.info(
        "%s: %s, %s parameters, %s on %s (%s), %d ranks, context %d, KV cache %d tokens",
        *(config.model_name, model_config.family, f"{part.model.num_parameters():,}", part.model.storage),
        *(outline.device.torch, part.kernels, outline.place.shard.size, max_model_len, kv_tokens),
    )
    noise = NoiseCache() if draft is not None else gumbel_noise  # a guess and its check draw with the same
    return Loaded(
        model_config=model_config,
        max_model_len=max_model_len,
        kv_tokens=kv_tokens,
        dtype=outline.dtype,
        device=outline.device,
        num_parameters=part.model.num_parameters(),
        tokenizer=tokenizer,
        chat_template=template,
        runner=ModelRunner(model, noise),
        new_scheduler=new_scheduler_factory(
            *(num_blocks, config.block_size, config.prefix_cache, config.max_running),
            *(config.max_batched_tokens, config.max_queued, config.max_itl_ratio),
        ),
        speculator=new_speculator(config, draft, kv_tokens, noise, outline.threads),
        leader=leader,
    )


def _chat_template(tokenizer: Tokenizer, source: str | None) -> ChatTemplate | None:
    if source is None:
        return None

    def content(name: str) -> str:
        token: Any = tokenizer.settings.get(name)
        return str(token.get("content", "") if isinstance(token, dict) else token or "")

    return ChatTemplate(source, {name: content(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")})


def _fitting(config: EngineConfig, wanted: int, kv_tokens: int) -> int:
    """The context that the KV cache has room for, if none was asked for."""
    if kv_tokens >= wanted or config.max_model_len:
        return wanted
    log.warning("the KV cache holds %d tokens, so the context is that and not the model's %d", kv_tokens, wanted)
    return kv_tokens
