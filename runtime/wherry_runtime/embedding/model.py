"""An embedding model, ready to compute: from token ids to vectors. Loading is blocking work, done once."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.embedding.pooling import Pooling, read_pooling
from wherry_runtime.engine.resources import Device, cpu_threads
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.gguf import raw_config
from wherry_runtime.loading.loader import choose_dtype, load_encoder
from wherry_runtime.loading.locate import locate
from wherry_runtime.models.encoder import Encoder, Packed
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.shard import check
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.tokenization.tokenizer import Tokenizer

log = logging.getLogger(__name__)

# Settings of what an embedding model has not, and what they must say: nothing.
_NOT_HERE = {
    "speculative": "there are no tokens to guess",
    "draft_model_uri": "there are no tokens to guess",
    "kv_cache_dtype": "there is no KV cache",
    "kv_cache_bytes": "there is no KV cache",
    "block_size": "there is no KV cache",
    "max_itl_ratio": "no answer waits for its next token",
}


@dataclass(slots=True, frozen=True)
class Embedder:
    """A loaded model.

    Attributes:
        max_length: tokens of a text, special ones included.
    """

    model: Encoder
    tokenizer: Tokenizer
    pooling: Pooling
    max_length: int

    @property
    def width(self) -> int:
        """Numbers in a vector."""
        return self.model.config.hidden_size

    def encode(self, text: str, cut: int | None = None) -> list[int]:
        """The tokens of a text, special ones included; of its beginning, `cut` at most."""
        if self.pooling.lowercase:
            text = text.lower()
        return self.tokenizer.encode(text) if cut is None else self.tokenizer.encode_cut(text, cut)

    def embed(self, texts: Sequence[Sequence[int]], dimensions: Sequence[int | None]) -> list[bytes | None]:
        """The vectors of texts of 1 to `max_length` token ids: float32, little-endian; None where there is no number.

        Args:
            dimensions: of each text's vector, which is cut to as many numbers; None: all of them.
        """
        with torch.inference_mode():
            packed = Packed.of(texts, self.model.storage.device)
            groups = [self.pooling.pooled(rows) for rows in packed.split(self.model.hidden(packed))]
            pooled = torch.cat(groups)[packed.order].cpu()
            vectors = self.pooling.finish(pooled).numpy()
            cut = {i: self.pooling.finish(pooled[i, :size]).numpy() for i, size in enumerate(dimensions) if size}
        finite = np.isfinite(vectors).all(axis=1)
        return [cut.get(i, vector).astype("<f4").tobytes() if finite[i] else None for i, vector in enumerate(vectors)]


def is_embedding_model(config: EngineConfig) -> bool:
    """Whether the model, which is here, turns texts into vectors.

    Raises:
        ModelError: it cannot be read.
    """
    return read_config(locate(config.model_uri)).encoder is not None


def load_embedder(config: EngineConfig) -> Embedder:
    """Loads the model.

    Raises:
        ModelError: why not; bad_setting, for what an embedding model has not.
    """
    _check_settings(config)
    directory = locate(config.model_uri)
    model_config = read_config(directory)
    if model_config.encoder is None:
        raise ModelError("bad_setting", f"{model_config.architecture} is no embedding model")
    check(model_config, config.tensor_parallel)
    device = Device.choose()
    if device.torch.type == "cpu":
        torch.set_num_threads(config.threads or cpu_threads())
    dtype = choose_dtype(config.dtype, model_config, device.torch)
    try:
        storage = Storage(dtype, device.torch, config.quantization, config.quantization_group)
    except ValueError as e:
        raise ModelError("bad_setting", str(e)) from e
    cache = Path(config.weight_cache).expanduser() if config.weight_cache else None
    model = load_encoder(directory, model_config, model_config.encoder, storage, cache)
    pooling = read_pooling(directory, raw_config(directory)[0])
    tokenizer = Tokenizer(directory)
    embedder = Embedder(model, tokenizer, pooling, _max_length(config, model_config, pooling))
    log.info(
        "%s: %s, %s parameters, %s on %s, %s pooling, %d numbers, texts of %d tokens",
        *(config.model_name, model_config.family, f"{model.num_parameters():,}", storage, device.torch),
        *(pooling.kind, embedder.width, embedder.max_length),
    )
    return embedder


def _check_settings(config: EngineConfig) -> None:
    defaults = EngineConfig(model_name="", model_uri="")
    for name, reason in _NOT_HERE.items():
        if getattr(config, name) != getattr(defaults, name):
            flag = name.replace("_", "-")
            raise ModelError("bad_setting", f"this is an embedding model: {reason}; leave out --{flag}")
    if config.backend == "native":
        raise ModelError("bad_setting", "embedding models are computed by PyTorch; leave out --backend native")


def _max_length(config: EngineConfig, model_config: ModelConfig, pooling: Pooling) -> int:
    """Tokens of a text. What was asked for may be more than sentence-transformers would take, not than the model has.

    Raises:
        ModelError: bad_setting.
    """
    own = model_config.max_position_embeddings
    if config.max_model_len > own:
        raise ModelError("bad_setting", f"max_model_len {config.max_model_len} is more than the model's context, {own}")
    return config.max_model_len or min(own, pooling.max_length or own)
