"""The paged KV cache's memory, and how much of it there is."""

import torch

from wherry_runtime.loading.config import ModelConfig


def bytes_per_token(config: ModelConfig, dtype: torch.dtype) -> int:
    """Memory that the keys and values of one token take in all layers."""
    return config.num_layers * 2 * config.num_kv_heads * config.head_dim * dtype.itemsize


class PagedKVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens, per layer.

    A layer is one tensor [num_blocks + 1, block_size, 2 * num_kv_heads, head_dim]: the keys' heads, then the values'.
    One tensor for both means one write and one gather a layer. The last block belongs to nobody: it pads block tables.
    Memory starts as zeros and stays finite, because masked entries are still multiplied (by zero) in attention.
    """

    def __init__(
        self, config: ModelConfig, num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        shape = (num_blocks + 1, block_size, 2 * config.num_kv_heads, config.head_dim)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.padding_block = num_blocks
        self.layers = [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.num_layers)]

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks: what a failed step wrote (infinities, NaN) must not reach whoever gets them next."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.layers[0].device)
        for layer in self.layers:
            layer.index_fill_(0, index, 0)
