"""A model on PyTorch, operation by operation."""

from collections.abc import Iterator

import numpy as np
import torch

from wherry_runtime.attention.metadata import MetadataBuilder
from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.layers.eager import Batch, EagerOps
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.parallel.collective import Collective


class EagerModel:
    """The reference of the other backends, and what runs where none of them can."""

    sampler = None

    def __init__(self, model: Decoder, cache: PagedKVCache, collective: Collective | None = None) -> None:
        self.decoder = model
        self.cache = cache
        self._collective = collective
        self._device = cache.layers[0].device
        # Masks are of the queries' type, whatever keys are kept in.
        dtype = model.storage.dtype
        distances = model.config.alibi != 0
        self._metadata = MetadataBuilder(cache.block_size, cache.padding_block, dtype, self._device, distances)
        self._windows = set(model.config.windows) or {None}

    def prepare(self, prepared: Prepared) -> None:
        """Nothing."""

    def logits(self, prepared: Prepared) -> Iterator[torch.Tensor]:
        """Computes a step: [S, vocab_size] float32, all in one part."""
        model = self.decoder
        ops = EagerOps(self._batch(prepared), self.cache, model.rope, self._collective, model.local_rope)
        yield self.decoder.logits(ops, self.decoder.hidden(ops)).float()

    def _batch(self, prepared: Prepared) -> Batch:
        sequences = prepared.sequences
        tokens = np.array([token for s in sequences for token in s.tokens], dtype=np.int64)
        packed = torch.from_numpy(np.stack([tokens, prepared.positions, prepared.slots])).to(self._device)
        return Batch(
            token_ids=packed[0],
            positions=packed[1],
            slots=packed[2],
            sampled_rows=torch.tensor(prepared.sampled_rows, dtype=torch.int64, device=self._device),
            attention={window: self._metadata.build(sequences, window) for window in self._windows},
        )
