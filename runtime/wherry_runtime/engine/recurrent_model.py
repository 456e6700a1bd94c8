"""A model without attention on PyTorch."""

from collections.abc import Iterator

import torch

from wherry_runtime.engine.prepared import Prepared
from wherry_runtime.kvcache.states import StateCache
from wherry_runtime.models.recurrent import RecurrentDecoder
from wherry_runtime.scheduling.plan import SequenceStep


class RecurrentModel:
    """Sequences that advance by one token are computed together, prompts one after the other."""

    sampler = None

    def __init__(self, model: RecurrentDecoder, cache: StateCache) -> None:
        self.decoder = model
        self.cache = cache

    def prepare(self, prepared: Prepared) -> None:
        """Nothing."""

    def logits(self, prepared: Prepared) -> Iterator[torch.Tensor]:
        """Computes a step: [S, vocab_size] float32, all in one part."""
        sequences = prepared.sequences
        decodes = [index for index, sequence in enumerate(sequences) if len(sequence.tokens) == 1]
        alone = [[index] for index, sequence in enumerate(sequences) if len(sequence.tokens) > 1]
        last: dict[int, torch.Tensor] = {}
        for members in ([decodes] if decodes else []) + alone:
            rows = self._advance([sequences[index] for index in members])
            last.update(zip(members, rows, strict=True))
        sampled = [last[index] for index, sequence in enumerate(sequences) if sequence.samples]
        if sampled:
            yield self.decoder.logits(torch.stack(sampled))
        else:
            yield torch.empty(0, self.decoder.config.vocab_size, device=self.cache.device)

    def _advance(self, sequences: list[SequenceStep]) -> torch.Tensor:
        """Computes as many tokens of each: the residual stream after their last ones, [B, hidden_size]."""
        device = self.cache.device
        tokens = torch.tensor([sequence.tokens for sequence in sequences], dtype=torch.int64, device=device)
        blocks = torch.tensor([int(sequence.blocks[0]) for sequence in sequences], dtype=torch.int64, device=device)
        fresh = torch.tensor([sequence.start == 0 for sequence in sequences], device=device)
        x, states = self.decoder.hidden(tokens, self.cache.read(blocks, fresh))
        self.cache.write(blocks, states)
        return x[:, -1]
