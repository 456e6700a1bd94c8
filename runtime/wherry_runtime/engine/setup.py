"""Everything between an EngineConfig and an engine that can step: blocking work, done once."""

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.engine.backend import build, cuda_workspace, use_cuda, use_native
from wherry_runtime.engine.core import new_scheduler_factory
from wherry_runtime.engine.resources import Device, cpu_threads
from wherry_runtime.engine.rng import NoiseCache, gumbel_noise
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.engine.speculative.setup import load_draft, new_speculator
from wherry_runtime.engine.speculative.speculator import Speculator
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kvcache.formats import choose_format
from wherry_runtime.kvcache.paged import bytes_per_token
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import choose_dtype, load_model
from wherry_runtime.loading.locate import locate
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.storage import Storage
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

    async def encode(self, text: str, *, special_tokens: bool) -> list[int]:
        """Token ids of `text`, off the event loop if it is long."""
        if len(text) <= SHORT_TEXT:
            return self.tokenizer.encode(text, special_tokens=special_tokens)
        return await asyncio.to_thread(self.tokenizer.encode, text, special_tokens=special_tokens)


def load(config: EngineConfig) -> Loaded:
    """Loads the model and makes its KV cache.

    Raises:
        ModelError: why not.
    """
    if config.tensor_parallel != 1:
        raise ModelError("bad_setting", "tensor_parallel is 1 in this version")
    device = Device.choose()
    threads = config.threads or cpu_threads()
    if device.torch.type == "cpu":
        torch.set_num_threads(threads)
    directory = locate(config.model_uri)
    model_config = read_config(directory)
    tokenizer = Tokenizer(directory)
    dtype = choose_dtype(config.dtype, model_config, device.torch)
    wanted = _model_length(config, model_config)
    template = _chat_template(tokenizer, find_template(directory, tokenizer.settings))
    stored = choose_format(config.kv_cache_dtype, dtype)
    native = use_native(config.backend, model_config, dtype, stored, config.block_size, device.torch)
    cuda = use_cuda(config.backend, model_config, stored, device.torch)
    try:
        storage = Storage(dtype, device.torch, config.quantization, config.quantization_group, native)
    except ValueError as e:
        raise ModelError("bad_setting", str(e)) from e
    cache_root = Path(config.weight_cache).expanduser() if config.weight_cache else None
    model = load_model(directory, model_config, wanted, storage, cache_root)
    draft = load_draft(config, model_config, tokenizer, wanted, device.torch)
    beside = draft.bytes_per_token if draft is not None else 0
    workspace = cuda_workspace(model, config.block_size, stored, min(config.max_batched_tokens, wanted)) if cuda else 0
    token_bytes = bytes_per_token(model_config, stored, native=native)
    num_blocks = _num_blocks(config, wanted, token_bytes, device, beside, workspace)
    kv_tokens = num_blocks * config.block_size
    max_model_len = _fitting(config, wanted, kv_tokens)
    log.info(
        "%s: %s, %s parameters, %s on %s (%s), context %d, KV cache %d tokens",
        *(config.model_name, model_config.family, f"{model.num_parameters():,}", storage, device.torch),
        library.target() if native else "Triton" if cuda else "PyTorch",
        *(max_model_len, kv_tokens),
    )
    noise = NoiseCache() if draft is not None else gumbel_noise  # a guess and its check draw with the same
    rows = config.max_running * (1 + (0 if config.speculative == "none" else config.max_draft_tokens))
    size, kernels = config.block_size, {"native": native, "cuda": cuda}
    runner = ModelRunner(build(model, num_blocks, size, stored, **kernels, threads=threads, max_decodes=rows), noise)
    return Loaded(
        model_config=model_config,
        max_model_len=max_model_len,
        kv_tokens=kv_tokens,
        dtype=dtype,
        device=device,
        num_parameters=model.num_parameters(),
        tokenizer=tokenizer,
        chat_template=template,
        runner=runner,
        new_scheduler=new_scheduler_factory(
            *(num_blocks, config.block_size, config.prefix_cache, config.max_running),
            *(config.max_batched_tokens, config.max_queued, config.max_itl_ratio),
        ),
        speculator=new_speculator(config, draft, kv_tokens, noise, threads),
    )


def _chat_template(tokenizer: Tokenizer, source: str | None) -> ChatTemplate | None:
    if source is None:
        return None

    def content(name: str) -> str:
        token: Any = tokenizer.settings.get(name)
        return str(token.get("content", "") if isinstance(token, dict) else token or "")

    return ChatTemplate(source, {name: content(name) for name in ("bos_token", "eos_token", "pad_token", "unk_token")})


def _model_length(config: EngineConfig, model_config: ModelConfig) -> int:
    """The context to serve.

    Raises:
        ModelError: bad_setting, when more is asked for than the model has.
    """
    own = model_config.max_position_embeddings
    if config.max_model_len > own:
        raise ModelError("bad_setting", f"max_model_len {config.max_model_len} is more than the model's context, {own}")
    return config.max_model_len or own


def _fitting(config: EngineConfig, wanted: int, kv_tokens: int) -> int:
    """The context that the KV cache has room for, if none was asked for."""
    if kv_tokens >= wanted or config.max_model_len:
        return wanted
    log.warning("the KV cache holds %d tokens, so the context is that and not the model's %d", kv_tokens, wanted)
    return kv_tokens


def _num_blocks(
    config: EngineConfig, max_model_len: int, token_bytes: int, device: Device, beside: int, workspace: int
) -> int:
    """KV cache blocks: what was asked for or what memory allows, but no more than a full batch can use.

    `beside`: bytes that a token takes in a second cache as long as this one. `workspace`: see `Device`.

    Raises:
        ModelError: kv_cache_too_small, when there is no room for a single block.
    """
    per_block = token_bytes * config.block_size
    memory = config.kv_cache_bytes or device.memory_for_cache(workspace) * token_bytes // (token_bytes + beside)
    useful = config.max_running * -(-max_model_len // config.block_size)
    num_blocks = min(memory // per_block, useful)
    if num_blocks < 1:
        raise ModelError(
            "kv_cache_too_small", f"{memory} bytes for the KV cache are less than a block of {per_block}; give it more"
        )
    return num_blocks
