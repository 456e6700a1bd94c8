"""How much GPU memory a step takes."""

import logging
import time

import numpy as np
import torch

from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.kernels.cuda.model import CudaModel
from wherry_runtime.kvcache.formats import KVFormat
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.scheduling.plan import SequenceStep

log = logging.getLogger(__name__)

SAMPLED = 64  # rows that draw a token


def workspace_bytes(model: Decoder, block_size: int, stored: KVFormat, max_rows: int) -> int:
    """Computes a prompt of `max_rows` tokens and says how much memory that took besides the cache, at its peak.

    Kernels are compiled meanwhile, and libraries set up, so that the first request need not wait for that. All of the
    prompt's blocks are one and the same: what is computed is nonsense of the right size.
    """
    device = model.storage.device
    cache = PagedKVCache(model.config, 1, block_size, dtype=stored, device=device)
    steps = CudaModel(model, cache, max_decodes=0)
    blocks = np.zeros(-(-max_rows // block_size), dtype=np.int32)
    positions = list(range(max_rows))
    slots = [position % block_size for position in positions]
    prompt = SequenceStep("", [0] * max_rows, 0, blocks, samples=True)
    sampled_rows = list(range(max(0, max_rows - SAMPLED), max_rows))
    prepared = Prepared([prompt], positions, slots, sampled_rows, [""] * len(sampled_rows))
    began = time.monotonic()
    before = _allocated(device)
    with torch.inference_mode():
        for logits in steps.logits(prepared):
            logits.argmax(dim=-1).tolist()  # waits for the GPU
    taken = _peak(device) - before
    log.info("a step of %d tokens takes %d MiB; computed in %.1f s", max_rows, taken >> 20, time.monotonic() - began)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return taken


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
