"""Everything between an EngineConfig and a speculator."""

import logging
from dataclasses import dataclass

import torch

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.engine.backend import build, use_cuda, use_native
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.engine.sampling import Noise
from wherry_runtime.engine.speculative.draft_model import DraftModel
from wherry_runtime.engine.speculative.policy import Costs
from wherry_runtime.engine.speculative.speculator import Speculator
from wherry_runtime.kvcache.formats import KVFormat, choose_format
from wherry_runtime.kvcache.paged import bytes_per_token
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import choose_dtype, load_model
from wherry_runtime.loading.locate import locate
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.tokenization.tokenizer import Tokenizer

log = logging.getLogger(__name__)

MAX_ROWS = 512  # that the draft model reads in one pass: what running answers wait for at most


@dataclass(slots=True, frozen=True)
class Draft:
    """A draft model without a KV cache."""

    config: ModelConfig
    model: Decoder
    stored: KVFormat
    native: bool
    cuda: bool
    max_length: int

    @property
    def bytes_per_token(self) -> int:
        """Of KV cache."""
        return bytes_per_token(self.config, self.stored, native=self.native)


def load_draft(
    config: EngineConfig, target: ModelConfig, tokenizer: Tokenizer, max_length: int, device: torch.device
) -> Draft | None:
    """The draft model that `config` names, in the formats of the model; None if it wants none.

    Raises:
        ModelError: bad_setting, or draft_mismatch if its tokens are not the model's; and all that loading raises.
    """
    _check(config)
    if not config.draft_model_uri:
        return None
    directory = locate(config.draft_model_uri)
    draft = read_config(directory)
    if draft.vocab_size != target.vocab_size:
        raise ModelError(
            "draft_mismatch",
            f"{directory}: the draft model has {draft.vocab_size} tokens and the model {target.vocab_size}; "
            "a draft model must share the model's tokenizer",
        )
    if (directory / "tokenizer.json").is_file() and (other := Tokenizer(directory).differs_from(tokenizer)) is not None:
        raise ModelError(
            "draft_mismatch",
            f"{directory}: token {other} is another one than the model's; "
            "a draft model must share the model's tokenizer",
        )
    length = min(max_length, draft.max_position_embeddings)
    if length < max_length:
        log.warning("the draft model's context is %d: answers beyond it are not speculated on with it", length)
    dtype = choose_dtype(config.dtype, draft, device)
    stored = choose_format(config.kv_cache_dtype, dtype)
    native = use_native(config.backend, draft, dtype, stored, config.block_size, device)
    storage = Storage(dtype, device, config.quantization, config.quantization_group, native)
    cuda = use_cuda(config.backend, draft, stored, device)
    model = load_model(directory, draft, length, storage)
    if not isinstance(model, Decoder):
        raise ModelError("bad_setting", f"{directory}: a model without attention cannot draft: it takes no guess back")
    return Draft(draft, model, stored, native, cuda, length)


def _check(config: EngineConfig) -> None:
    """Raises ModelError where settings contradict each other."""
    drafts = config.speculative in ("draft", "auto")
    if config.speculative == "draft" and not config.draft_model_uri:
        raise ModelError("bad_setting", "speculative is draft: name the draft model with draft_model_uri")
    if config.draft_model_uri and not drafts:
        raise ModelError(
            "bad_setting", f"draft_model_uri is set, but speculative is {config.speculative}: use draft or auto"
        )
    if config.speculative != "none" and config.max_draft_tokens < 1:
        raise ModelError("bad_setting", f"max_draft_tokens is {config.max_draft_tokens}; it must be at least 1")


def new_speculator(
    config: EngineConfig, draft: Draft | None, kv_tokens: int, noise: Noise, threads: int
) -> Speculator | None:
    """The speculator that `config` wants, if any. A draft model gets a KV cache for `kv_tokens` tokens and draws with
    the model's `noise`."""
    if config.speculative == "none":
        return None
    costs = Costs()
    model = None
    if draft is not None:
        # The guesses that every sequence may have on top of what the target's cache holds.
        spare = config.max_running * -(-config.max_draft_tokens // config.block_size)
        num_blocks = -(-kv_tokens // config.block_size) + spare
        built = build(
            *(draft.model, num_blocks, config.block_size, draft.stored),
            native=draft.native,
            threads=threads,
            cuda=draft.cuda,
            max_decodes=config.max_running,
        )
        model = DraftModel(
            ModelRunner(built),
            num_blocks,
            config.block_size,
            max_length=draft.max_length,
            max_rows=MAX_ROWS,
            cost=costs.drafting,
            noise=noise,
        )
        log.info("draft model: %s parameters", f"{draft.model.num_parameters():,}")
    return Speculator(
        costs, lookup=config.speculative in ("ngram", "auto"), draft=model, max_guesses=config.max_draft_tokens
    )
