"""Which backend computes a model: our own kernels for the device where they can, PyTorch everywhere else.

On a CPU these are the native kernels, on CUDA those in Triton; `native` as a setting asks for the device's.
"""

import logging

import torch

from wherry_protocol.engine_config import Backend
from wherry_runtime.attention.native import unsupported
from wherry_runtime.engine.eager_model import EagerModel
from wherry_runtime.engine.recurrent_model import RecurrentModel
from wherry_runtime.engine.runner import Model
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kernels.cpu.model import NativeModel
from wherry_runtime.kernels.cpu.recorder import Ranks
from wherry_runtime.kernels.cuda import support as cuda_support
from wherry_runtime.kvcache.formats import KVFormat
from wherry_runtime.kvcache.native import GROUP, NativeKVCache
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.kvcache.states import StateCache
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import AnyDecoder
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.recurrent import RecurrentDecoder
from wherry_runtime.parallel.collective import Collective

log = logging.getLogger(__name__)


def use_native(
    wanted: Backend, config: ModelConfig, dtype: torch.dtype, stored: KVFormat, block_size: int, device: torch.device
) -> bool:
    """Whether the native CPU kernels are to compute the model.

    Raises:
        ModelError: bad_setting, when they were asked for and cannot.
    """
    if wanted == "pytorch" or device.type == "cuda" or (wanted == "auto" and device.type != "cpu"):
        return False
    return _can(wanted, "native", _why_not(config, dtype, stored, block_size, device))


def use_cuda(wanted: Backend, config: ModelConfig, stored: KVFormat, device: torch.device) -> bool:
    """Whether the CUDA kernels are to compute the model.

    Raises:
        ModelError: bad_setting, when they were asked for and cannot.
    """
    if wanted == "pytorch" or device.type != "cuda":
        return False
    return _can(wanted, "CUDA", cuda_support.unavailable(device) or cuda_support.unsupported(config, stored))


def _can(wanted: Backend, kernels: str, reason: str | None) -> bool:
    """Whether there is no reason against these kernels; PyTorch instead is only for who did not ask for them."""
    if reason is None:
        return True
    if wanted == "native":
        raise ModelError("bad_setting", f"the {kernels} kernels cannot run this model: {reason}")
    log.warning("the model runs on PyTorch, which is slower than the %s kernels: %s", kernels, reason)
    return False


def _why_not(
    config: ModelConfig, dtype: torch.dtype, stored: KVFormat, block_size: int, device: torch.device
) -> str | None:
    """None, or why the native kernels cannot do it."""
    if device.type != "cpu":
        return f"the device is {device.type}"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"{dtype} activations; float32 and bfloat16 are known"
    if stored.native is None:
        return f"a KV cache in {stored.name}"
    if block_size % GROUP:
        return f"block_size {block_size} is not a multiple of {GROUP}"
    try:
        library.load()
    except library.NativeUnavailableError as e:
        return str(e)
    return unsupported(config)


def build(
    model: AnyDecoder,
    num_blocks: int,
    block_size: int,
    stored: KVFormat,
    *,
    native: bool,
    threads: int,
    cuda: bool = False,
    max_decodes: int = 64,
    ranks: Ranks | None = None,
    collective: Collective | None = None,
) -> Model:
    """The model with a KV cache of its own, ready to compute.

    Args:
        max_decodes: rows of the largest step without prompts, which CUDA graphs are recorded for.
        ranks, collective: how a part of a model comes together with the others; on the native kernels, and elsewhere.
    """
    if isinstance(model, RecurrentDecoder):
        states = StateCache(model.kept(), num_blocks, block_size, model.storage.device)
        return RecurrentModel(model, states)
    if native:
        return NativeModel(model, NativeKVCache(model.config, num_blocks, block_size, stored=stored), threads, ranks)
    cache = PagedKVCache(model.config, num_blocks, block_size, dtype=stored, device=model.storage.device)
    if cuda:
        # Imported here: Triton comes with PyTorch's CUDA builds only.
        from wherry_runtime.kernels.cuda.model import CudaModel

        return CudaModel(model, cache, max_decodes, collective)
    if model.storage.quantization != "none" and model.storage.product is None:
        log.warning("%s weights save memory but are slow on PyTorch, which unpacks them anew", model.storage)
    return EagerModel(model, cache, collective)


def cuda_workspace(model: Decoder, block_size: int, stored: KVFormat, max_rows: int) -> int:
    """Bytes of GPU memory that a step of `max_rows` rows takes besides weights and KV cache, found by computing one."""
    from wherry_runtime.kernels.cuda.memory import workspace_bytes

    return workspace_bytes(model, block_size, stored, max_rows)
