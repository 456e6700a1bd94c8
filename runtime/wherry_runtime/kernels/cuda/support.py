"""Whether the kernels can be had, and for what. Imports no Triton, which an installation for CPUs does not have."""

import importlib.util
import os
import shutil

import torch

from wherry_runtime.attention.features import beyond_kernels
from wherry_runtime.kvcache.formats import KVFormat
from wherry_runtime.loading.config import ModelConfig

MOST_GROUP = 64  # query heads per key head
MOST_HEAD_DIM = 256
HEAD_MULTIPLE = 8  # so that a head begins on 8 bytes whatever the cache's type
COMPILERS = ("gcc", "clang")
OLDEST = (8, 0)  # compute capability: bfloat16 in tensor cores, asynchronous copies


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, on tensors in CPU memory: for tests without a GPU."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


def unavailable(device: torch.device) -> str | None:
    """None, or why there are no kernels for `device`."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed; PyTorch's CUDA builds for Linux bring it: pip install torch triton"
    if interpreted():
        return None
    if device.type != "cuda":
        return f"the device is {device.type}"
    if torch.version.hip is not None:
        return "they are made for CUDA, and this is PyTorch for ROCm"
    if (capability := torch.cuda.get_device_capability(device)) < OLDEST:
        found, needed = (".".join(map(str, c)) for c in (capability, OLDEST))
        return f"{torch.cuda.get_device_name(device)} has compute capability {found}; {needed} is needed"
    if not os.environ.get("CC") and not any(map(shutil.which, COMPILERS)):
        return "there is no C compiler, which Triton needs to reach CUDA's driver; install gcc or clang, or set CC"
    return None


def unsupported(config: ModelConfig, stored: KVFormat) -> str | None:
    """None, or why the kernels cannot compute this model with such a KV cache."""
    if config.head_dim % HEAD_MULTIPLE or config.head_dim > MOST_HEAD_DIM:
        return f"heads of {config.head_dim} columns; multiples of {HEAD_MULTIPLE} up to {MOST_HEAD_DIM} are known"
    if (group := config.num_heads // config.num_kv_heads) > MOST_GROUP:
        return f"{group} query heads share a key head; up to {MOST_GROUP} may"
    if stored.name not in ("float32", "bfloat16", "float16", "fp8", "int8"):
        return f"a KV cache in {stored.name}"
    missing = [
        what
        for has, what in (
            *beyond_kernels(config),
            (config.alibi != 0, "linear biases (ALiBi)"),
            (config.attention_softcap is not None, "soft cap of scores"),
            (config.local_rope is not None, "second rotary embedding"),
            (config.clip_qkv is not None, "clipped queries, keys and values"),
            (config.qk_norm in ("heads", "whole"), "norms with weights of each head, or over all heads"),
        )
        if has
    ]
    return f"the CUDA kernels have no {', '.join(missing)}" if missing else None
