"""Memory for the states of models without attention: the part that the paged KV cache plays for others.

A block holds one sequence, whatever its length: the block manager gives each sequence one block, whose number says
where its states are.
"""

import math

import torch

from wherry_runtime.layers.recurrent import Kept, States


def state_bytes(kept: list[tuple[Kept, ...]]) -> int:
    """Memory of one sequence in all layers."""
    return 4 * sum(math.prod(one.shape) for layer in kept for one in layer)


class StateCache:
    """States of `num_blocks` sequences: for each layer and tensor of its state, [num_blocks, …] float32.

    Attributes:
        block_size: tokens in a block: more than any sequence has.
    """

    def __init__(self, kept: list[tuple[Kept, ...]], num_blocks: int, block_size: int, device: torch.device) -> None:
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.device = device
        self._kept = kept
        self._layers = [
            tuple(torch.zeros((num_blocks, *one.shape), dtype=torch.float32, device=device) for one in layer)
            for layer in kept
        ]

    def scrub(self, blocks: list[int]) -> None:
        """Nothing: whoever gets a block next begins with its first token, and reads nothing of what is there."""

    def read(self, blocks: torch.Tensor, fresh: torch.Tensor) -> list[States]:
        """The states of B sequences.

        Args:
            blocks: [B] int64.
            fresh: [B] bool: those that have no tokens yet.
        """
        return [
            tuple(self._one(tensor, one, blocks, fresh) for tensor, one in zip(tensors, layer, strict=True))
            for tensors, layer in zip(self._layers, self._kept, strict=True)
        ]

    def _one(self, tensor: torch.Tensor, kept: Kept, blocks: torch.Tensor, fresh: torch.Tensor) -> torch.Tensor:
        found = tensor.index_select(0, blocks)
        found[fresh] = kept.initial
        return found

    def write(self, blocks: torch.Tensor, states: list[States]) -> None:
        """Puts the states of B sequences back; blocks [B] int64."""
        for tensors, layer in zip(self._layers, states, strict=True):
            for tensor, state in zip(tensors, layer, strict=True):
                tensor.index_copy_(0, blocks, state)
