"""From a model directory to a model in memory."""

import logging
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
from msgspec.structs import replace as replace_field

from wherry_protocol.engine_config import Dtype
from wherry_runtime.formats.detect import kind_of
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.product import Products
from wherry_runtime.kernels.cuda import support as cuda_support
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.layers.linear import Slots
from wherry_runtime.loading.checkpoint import fill, iterate_tensors, shard_files
from wherry_runtime.loading.config import Layout, ModelConfig
from wherry_runtime.loading.encoder_config import EncoderConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.gguf import GGUFCheckpoint
from wherry_runtime.loading.quantized import QuantizedCheckpoint
from wherry_runtime.loading.weight_cache import WeightCache, WeightCacheError
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.encoder import Encoder
from wherry_runtime.models.layout import layer_prefix
from wherry_runtime.models.recurrent import RecurrentDecoder
from wherry_runtime.parallel.shard import Shard
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.packed import Rows, Turned
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
M = TypeVar("M", Decoder | RecurrentDecoder, Encoder)
# Of norms, in checkpoints that were converted from TensorFlow.
_OLD_NAMES = {"gamma": "weight", "beta": "bias"}


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
            quantized again. embedding_model: it generates nothing.
    """
    shard = shard or Shard()
    if config.encoder is not None:
        raise ModelError(
            "embedding_model", f"{directory}: {config.architecture} turns texts into vectors and generates nothing"
        )

    def empty(storage: Storage) -> AnyDecoder:
        return empty_model(config, num_positions, storage, shard)

    return _load(directory, config, storage, cache_root, shard, empty)


def empty_model(config: ModelConfig, num_positions: int, storage: Storage, shard: Shard | None = None) -> AnyDecoder:
    """The model, or a rank's part of it, without its weights."""
    if config.recurrent is not None:
        return RecurrentDecoder(config, config.recurrent, storage)
    return Decoder(config, num_positions, storage, shard)


def load_encoder(
    directory: Path, config: ModelConfig, shape: EncoderConfig, storage: Storage, cache_root: Path | None = None
) -> Encoder:
    """An encoder with its weights. Arguments and errors are those of `load_model`."""
    return _load(directory, config, storage, cache_root, Shard(), lambda storage: Encoder(config, shape, storage))


def _load(
    directory: Path,
    config: ModelConfig,
    storage: Storage,
    cache_root: Path | None,
    shard: Shard,
    empty: Callable[[Storage], M],
) -> M:
    quantized = _quantized(directory, config)
    if isinstance(quantized, QuantizedCheckpoint):
        storage = _keeping(storage, quantized, config, directory)
    elif quantized is not None and storage.quantization == "none":
        storage = _keeping_blocks(storage, quantized, config, directory)
    storage = _with_products(storage)
    cache = None
    if cache_root is not None and storage.packs:
        # Queries' and keys' order, for one, is a matter of config.json.
        order = config.rope.order(config.head_dim) if config.rope is not None else None
        cache = WeightCache(cache_root, directory, storage, shard, f"{config.architecture} {order}")

    with torch.inference_mode():
        if cache is not None and (cached := _from_cache(cache, lambda: empty(storage))) is not None:
            return cached
        model = empty(storage)
        _fill(model, directory, config, quantized, storage)
        if cache is not None:
            cache.write(model.state())
    return model


def fill_part(model: AnyDecoder, directory: Path, config: ModelConfig, chosen: Callable[[str], bool]) -> None:
    """Reads those tensors of an empty model that are `chosen` by name.

    Raises:
        ModelError: what is wrong with the checkpoint; see `checkpoint`.
    """
    with torch.inference_mode():
        _fill(model, directory, config, _quantized(directory, config), model.storage, chosen)


def _fill(
    model: AnyDecoder | Encoder,
    directory: Path,
    config: ModelConfig,
    quantized: QuantizedCheckpoint | GGUFCheckpoint | None,
    storage: Storage,
    chosen: Callable[[str], bool] = lambda name: True,
) -> None:
    slots = model.slots()
    tensors = as_named(_tensors(directory, config, slots, quantized, storage), slots, config)
    wanted = {name: slot for name, slot in slots.items() if chosen(name)}
    fill(wanted, ((name, tensor) for name, tensor in tensors if chosen(name)), directory)


def _tensors(
    directory: Path,
    config: ModelConfig,
    slots: Slots,
    quantized: QuantizedCheckpoint | GGUFCheckpoint | None,
    storage: Storage,
) -> Iterator[tuple[str, Rows | Turned]]:
    if quantized is None:
        yield from iterate_tensors(directory, storage.mapped)
        return
    if isinstance(quantized, GGUFCheckpoint):
        yield from quantized.rows(storage.held)
        return
    layout = config.layout
    yield from quantized.tensors({*slots, *(name.removeprefix(layout.prefix) for name in slots)})
    layers = layer_prefix(config)
    for name, rows in quantized.matrices():
        # Whoever quantizes writes [outputs, inputs], whatever a layout's floats are like.
        if not layout.transposed or not whole_name(name, slots, layout).startswith(layers):
            yield name, rows
        else:
            yield name, rows.t() if isinstance(rows, torch.Tensor) else Turned(rows)


def _in_order(config: ModelConfig) -> bool:
    """Whether no matrix is turned or has its rows in another order; several may lie in one, one after another."""
    layout = config.layout if config.layout.grouped else replace_field(config.layout, fused={})
    return layout == Layout() and (config.rope is None or config.rope.order(config.head_dim) is None)


def _quantized(directory: Path, config: ModelConfig) -> QuantizedCheckpoint | GGUFCheckpoint | None:
    """The checkpoint, if it is in GGUF, or was quantized in a way that its architecture does not read by itself."""
    packed = config.experts is not None and config.experts.packed
    if packed:
        return None
    files = shard_files(directory)
    return GGUFCheckpoint.open(files) if kind_of(files[0]) == "gguf" else QuantizedCheckpoint.of(directory)


def as_named(
    tensors: Iterator[tuple[str, Rows | Turned]], slots: Slots, config: ModelConfig
) -> Iterator[tuple[str, Rows | Turned]]:
    """Tensors by the names of `slots`: with the prefix that some checkpoints leave out, and without the head that is
    kept twice where it is tied, and an encoder's heads for other tasks."""
    tied_head = config.layout.names.get("lm_head", "lm_head") + ".weight"
    heads = config.encoder.heads if config.encoder is not None else ()
    for given, tensor in tensors:
        if given.startswith(heads) or (config.tie_word_embeddings and given == tied_head):
            continue
        module, _, kind = given.rpartition(".")
        name = f"{module}.{_OLD_NAMES[kind]}" if config.encoder is not None and kind in _OLD_NAMES else given
        yield whole_name(name, slots, config.layout), tensor


def whole_name(name: str, known: Container[str], layout: Layout) -> str:
    """A tensor's name with the prefix that some checkpoints leave out, if that is one of the model's."""
    return f"{layout.prefix}{name}" if name not in known and f"{layout.prefix}{name}" in known else name


def _keeping(storage: Storage, quantized: QuantizedCheckpoint, config: ModelConfig, directory: Path) -> Storage:
    """`storage` for a quantized checkpoint: what our kernels can compute with stays as it is."""
    if storage.quantization != "none":
        raise ModelError(
            "bad_setting",
            f"{directory} is quantized already, by {quantized.method}; leave out --quantization {storage.quantization}",
        )
    if storage.native:
        held = quantized.formats()
    elif storage.device.type == "cuda":  # its kernels round all activations
        found = quantized.formats() if _on_cuda(storage, config) else {}
        held = {name: format_ for name, format_ in found.items() if not format_.outliers}
    else:  # ternary ones PyTorch unpacks anew for every step, which a tenth of the memory is worth
        held = quantized.ternary() or (quantized.formats() if _multiplies(storage) else {})
    log.info("%s: %s", directory, quantized.describe(held, storage.dtype))
    return replace(storage, held=_by_our_names(held, config))


def _on_cuda(storage: Storage, config: ModelConfig) -> bool:
    """Whether the CUDA kernels compute this model."""
    reason = cuda_support.unavailable(storage.device) or cuda_support.unsupported(config, FORMATS["float32"])
    return reason is None


def _by_our_names(held: Mapping[str, Format], config: ModelConfig) -> dict[str, Format]:
    """Formats of a checkpoint's matrices as those of the ones that we hold."""
    if not held or config.recurrent is not None or config.encoder is not None:
        return dict(held)
    model = Decoder(config, 1, Storage(torch.float32, torch.device("meta")))
    slots = model.slots()
    known = {whole_name(f"{name}.weight", slots, config.layout): format_ for name, format_ in held.items()}
    origins = {own: origin.name for own, origin in model.origins().items()}
    ends = {own: config.layout.names.get(own, own) for own in ("lm_head", "model.embed_tokens")}
    return {own: known[f"{name}.weight"] for own, name in {**origins, **ends}.items() if f"{name}.weight" in known}


def _multiplies(storage: Storage) -> bool:
    """Whether what a checkpoint has packed is multiplied as it is where PyTorch computes the rest on a CPU. In float32
    it is dequantized, and exact; without the native kernels PyTorch would unpack it anew for every step."""
    return storage.dtype is not torch.float32 and library.available()


def _with_products(storage: Storage) -> Storage:
    """`storage` with the native kernels' products, where PyTorch computes the rest on a CPU."""
    packed = storage.quantization != "none" or any(f.method != "ternary" for f in storage.held.values())
    if storage.native or storage.device.type != "cpu" or not packed or not library.available():
        return storage
    return replace(storage, product=Products(torch.get_num_threads()))


def _keeping_blocks(storage: Storage, model: GGUFCheckpoint, config: ModelConfig, directory: Path) -> Storage:
    """`storage` for a model in GGUF: blocks that our kernels can compute with stay as they are."""
    held = model.formats() if _in_order(config) else {}
    if storage.device.type == "cuda":
        # What PyTorch computes there, it would unpack anew for every step.
        computed = _on_cuda(storage, config)
        held = {name: format_ for name, format_ in held.items() if computed and not format_.two_level}
    elif not storage.native and not _multiplies(storage):
        held = {}
    log.info("%s: %s", directory, model.describe(held, storage.dtype))
    return replace(storage, held=held | _parts(held, config.layout.fused))


def _parts(held: Mapping[str, Format], fused: Mapping[str, tuple[str, ...]]) -> dict[str, Format]:
    """Of fused matrices, the formats of those that they hold."""
    found: dict[str, Format] = {}
    for name, format_ in held.items():
        for whole, modules in fused.items():
            if name.endswith(f".{whole}"):
                found |= {f"{name.removesuffix(whole)}{module}": format_ for module in modules}
    return found


def _from_cache(cache: WeightCache, empty: Callable[[], M]) -> M | None:
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
