"""From a model directory to a model in memory."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from wherry_protocol.engine_config import Dtype
from wherry_runtime.layers.linear import Slots
from wherry_runtime.loading.checkpoint import fill, iterate_tensors
from wherry_runtime.loading.config import Layout, ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.quantized import QuantizedCheckpoint
from wherry_runtime.loading.weight_cache import WeightCache, WeightCacheError
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.recurrent import RecurrentDecoder
from wherry_runtime.parallel.shard import Shard
from wherry_runtime.quantization.grouped import Grouped
from wherry_runtime.quantization.storage import Storage

log = logging.getLogger(__name__)

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def choose_dtype(wanted: Dtype, config: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype of weights, activations and KV cache.

    `auto` is the checkpoint's own, except on CPU: float16 becomes float32 there (its arithmetic is emulated), and so
    does bfloat16 where the processor has no instructions for it.
    """
    if wanted != "auto":
        return DTYPES[wanted]
    own = DTYPES[config.dtype]
    if device.type == "cpu" and (own is torch.float16 or (own is torch.bfloat16 and not _cpu_has_bfloat16())):
        return torch.float32
    return own


def _cpu_has_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices fast here: with AVX-512 or AMX (others are not measured yet)."""
    capabilities = torch.backends.cpu.get_cpu_capability()
    if capabilities.startswith(("SVE", "DEFAULT", "NO AVX", "AVX2", "VSX", "Z VECTOR")):
        return False
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


AnyDecoder = Decoder | RecurrentDecoder


def load_model(
    directory: Path,
    config: ModelConfig,
    num_positions: int,
    storage: Storage,
    cache_root: Path | None = None,
    shard: Shard | None = None,
) -> AnyDecoder:
    """The model, or a rank's part of it, with its weights, each put where it stays as it is read.

    Args:
        cache_root: where packed weights are kept for the next time; see `weight_cache`.
        shard: None: the whole model.

    Raises:
        ModelError: what is wrong with the checkpoint; see `checkpoint`. bad_setting: it is quantized, and is to be
            quantized again.
    """
    shard = shard or Shard()
    quantized = _quantized(directory, config)
    if quantized is not None:
        storage = _keeping(storage, quantized, config, directory)
    cache = None
    if cache_root is not None and storage.packs:
        # Queries' and keys' order, for one, is a matter of config.json.
        order = config.rope.order(config.head_dim) if config.rope is not None else None
        cache = WeightCache(cache_root, directory, storage, shard, f"{config.architecture} {order}")

    def empty() -> AnyDecoder:
        if config.recurrent is not None:
            return RecurrentDecoder(config, config.recurrent, storage)
        return Decoder(config, num_positions, storage, shard)

    with torch.inference_mode():
        if cache is not None and (cached := _from_cache(cache, empty)) is not None:
            return cached
        model = empty()
        slots = model.slots()
        fill(slots, as_named(_tensors(directory, config, slots, quantized), slots, config), directory)
        if cache is not None:
            cache.write(model.state())
    return model


def _tensors(
    directory: Path, config: ModelConfig, slots: Slots, quantized: QuantizedCheckpoint | None
) -> Iterator[tuple[str, torch.Tensor | Grouped]]:
    if quantized is None:
        yield from iterate_tensors(directory)
        return
    for name, tensor in quantized.tensors(slots):
        if isinstance(tensor, Grouped) and not as_stored(config):
            yield name, tensor.dequantized()
        else:
            yield name, tensor


def as_stored(config: ModelConfig) -> bool:
    """Whether matrices are held as the checkpoint has them: none is cut, turned or put in another order."""
    return config.layout == Layout() and (config.rope is None or config.rope.order(config.head_dim) is None)


def _quantized(directory: Path, config: ModelConfig) -> QuantizedCheckpoint | None:
    """The checkpoint, if it was quantized in a way that its architecture does not read by itself."""
    packed = config.experts is not None and config.experts.packed
    return None if packed else QuantizedCheckpoint.of(directory)


def as_named(
    tensors: Iterator[tuple[str, torch.Tensor | Grouped]], slots: Slots, config: ModelConfig
) -> Iterator[tuple[str, torch.Tensor | Grouped]]:
    """Tensors by the names of `slots`: with the prefix that some checkpoints leave out, and without the head that is
    kept twice where it is tied."""
    prefix, tied_head = config.layout.prefix, config.layout.names.get("lm_head", "lm_head") + ".weight"
    for name, tensor in tensors:
        if config.tie_word_embeddings and name == tied_head:
            continue
        yield (f"{prefix}{name}" if name not in slots and f"{prefix}{name}" in slots else name), tensor


def _keeping(storage: Storage, quantized: QuantizedCheckpoint, config: ModelConfig, directory: Path) -> Storage:
    """`storage` for a quantized checkpoint: what our kernels can compute with stays as it is."""
    if storage.quantization != "none":
        raise ModelError(
            "bad_setting",
            f"{directory} is quantized already, by {quantized.method}; leave out --quantization {storage.quantization}",
        )
    # PyTorch on CPU unpacks them anew for every step, which only ternary ones are worth, with a tenth of the memory.
    computed = storage.native or storage.device.type == "cuda"
    held = (quantized.formats() if computed else quantized.ternary()) if as_stored(config) else {}
    log.info("%s: %s", directory, quantized.describe(held, storage.dtype))
    return replace(storage, held=held)


def _from_cache(cache: WeightCache, empty: Callable[[], AnyDecoder]) -> AnyDecoder | None:
    if not cache.path.exists():
        return None
    # A model of its own: one that was filled halfway is thrown away, padding and all.
    model = empty()
    try:
        cache.read(model.state())
    except (WeightCacheError, FileNotFoundError) as e:
        log.warning("%s cannot be used and is written again: %s", cache.path, e)
        return None
    return model
