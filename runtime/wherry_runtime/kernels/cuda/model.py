"""A model on our CUDA kernels."""

import logging
import time
from bisect import bisect_left
from collections.abc import Iterator

import torch

from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.kernels.cuda.attention_decode import PART, Partials, num_programs
from wherry_runtime.kernels.cuda.attention_prefill import tokens_per_tile
from wherry_runtime.kernels.cuda.graphs import Direct, Graphs, buckets_up_to
from wherry_runtime.kernels.cuda.ops import CudaOps, Fixed
from wherry_runtime.kernels.cuda.rope_cache import CacheView
from wherry_runtime.kernels.cuda.sampling import CudaSampler
from wherry_runtime.kernels.cuda.staging import Staging
from wherry_runtime.kernels.cuda.step import Packed, Step, pack
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.parallel.collective import Alone, Collective

log = logging.getLogger(__name__)

MOST_PARTIAL_BYTES = 128 << 20  # of attention's parts in graphs; steps that need more are computed without
NOBODY = Prepared([], [], [], [], [])


class CudaModel:
    """Steps in which every sequence has one token replay a graph; others launch their kernels one by one.

    Args:
        max_decodes: rows that graphs are made for; 0: no graphs.
    """

    def __init__(
        self, model: Decoder, cache: PagedKVCache, max_decodes: int = 64, collective: Collective | None = None
    ) -> None:
        config = model.config
        self.decoder = model
        self.sampler = CudaSampler()
        self.cache = cache
        self._device = cache.layers[0].device
        self._windows = tuple(sorted(set(config.windows) or {None}, key=lambda w: w or 0))
        self._tile_tokens = tokens_per_tile(config.num_heads, config.num_kv_heads)
        cos, sin = (table.to(self._device).contiguous() for table in model.rope.tables())
        self._fixed = Fixed(
            [CacheView.of(cache, layer) for layer in range(config.num_layers)],
            cache.block_size,
            (cos, sin),
            num_programs(config.num_kv_heads, self._device),
            collective or Alone(),
        )
        self._staging = Staging(self._device)
        self._buckets = buckets_up_to(max_decodes) if max_decodes else ()
        if self._buckets:
            self._prepare_graphs(len(cos))

    def prepare(self, prepared: Prepared) -> None:
        """Nothing: a step's inputs go to the device in one piece, tokens included."""

    def logits(self, prepared: Prepared) -> Iterator[torch.Tensor]:
        """Computes a step: [S, vocab_size] float32, all in one part. Returns before the GPU is done."""
        bucket = self._bucket(prepared)
        packed = self._pack(prepared, bucket)
        if bucket is not None and packed.graphable and packed.items <= self._partials.capacity:
            self._staging.copy(packed.numbers, self._memory)
            yield self._graphs.replay(bucket)[: len(prepared.sampled_rows)]
            return
        if bucket is not None:
            packed = self._pack(prepared, None)
        memory = torch.empty(len(packed.numbers), dtype=torch.int32, device=self._device)
        self._staging.copy(packed.numbers, memory)
        yield self._compute(Step.of(memory, packed.shape), self._new_partials(packed.items))

    def _bucket(self, prepared: Prepared) -> int | None:
        """The smallest bucket with room for the step; None if it is not one for a graph."""
        rows = len(prepared.positions)
        if rows != len(prepared.sequences) or not self._buckets or rows > self._buckets[-1]:
            return None
        return self._buckets[bisect_left(self._buckets, rows)]

    def _pack(self, prepared: Prepared, bucket: int | None) -> Packed:
        return pack(prepared, self._windows, self.cache.block_size, self._tile_tokens, bucket)

    def _compute(self, step: Step, partials: Partials) -> torch.Tensor:
        ops = CudaOps(self._fixed, step, partials)
        return self.decoder.logits(ops, self.decoder.hidden(ops)).float()

    def _new_partials(self, items: int) -> Partials:
        return Partials.of(items, self.decoder.config.num_heads, self.decoder.config.head_dim, self._device)

    def _prepare_graphs(self, num_positions: int) -> None:
        """Memory that graphs read and work in, and the graphs."""
        config, rows = self.decoder.config, self._buckets[-1]
        item_bytes = 4 * config.num_heads * (config.head_dim + 1)
        items = max(rows, min(rows * -(-num_positions // PART), MOST_PARTIAL_BYTES // item_bytes))
        self._partials = self._new_partials(items)
        blocks = rows * -(-num_positions // self.cache.block_size)
        empty = {b: self._pack(NOBODY, b) for b in self._buckets}
        numbers = len(empty[rows].numbers) + blocks + len(self._windows) * items
        self._memory = torch.zeros(numbers, dtype=torch.int32, device=self._device)

        def compute(bucket: int) -> torch.Tensor:
            return self._compute(Step.of(self._memory, empty[bucket].shape), self._partials)

        def record(bucket: int) -> torch.Tensor:
            if not torch.cuda.is_current_stream_capturing():
                self._staging.copy(empty[bucket].numbers, self._memory)
            return compute(bucket)

        self._graphs: Direct | Graphs = Direct(compute)
        if self._device.type != "cuda":
            return
        began = time.monotonic()
        try:
            with torch.inference_mode():
                self._graphs = Graphs(record, self._buckets)
        except torch.OutOfMemoryError as error:
            log.warning("no memory for CUDA graphs, so steps take longer to launch; give the KV cache less: %s", error)
            self._buckets = ()
            return
        log.info("recorded steps of up to %d sequences in %.1f s", rows, time.monotonic() - began)
