"""The paged KV cache's memory, and how much of it there is."""

import torch

from wherry_runtime.kvcache.formats import KVFormat, format_of
from wherry_runtime.loading.config import ModelConfig


def bytes_per_token(config: ModelConfig, stored: KVFormat | torch.dtype, *, native: bool = False) -> int:
    """Memory that the keys and values of one token take in all layers; `native`: as the native kernels lay them out."""
    kept = format_of(stored)
    size = kept.element.itemsize
    if native:  # values are padded to whole vectors, and scales are float32
        head = (config.head_dim + -(-config.head_dim // 16) * 16) * size + (8 if kept.scaled else 0)
    else:
        head = 2 * kept.width(config.head_dim) * size
    return config.num_layers * config.num_kv_heads * head


class PagedKVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens, per layer.

    A layer is one tensor [num_blocks + 1, block_size, 2 * num_kv_heads, width]: the keys' heads, then the values'. The
    width is head_dim, and four more bytes for int8's scale. One tensor for both means one write and one gather a layer.
    The last block belongs to nobody: it pads block tables. Memory starts as zeros and stays finite, because masked
    entries are still multiplied (by zero) in attention.
    """

    def __init__(
        self,
        config: ModelConfig,
        num_blocks: int,
        block_size: int,
        *,
        dtype: KVFormat | torch.dtype,
        device: torch.device,
    ) -> None:
        self.stored = format_of(dtype)
        width = self.stored.width(config.head_dim)
        shape = (num_blocks + 1, block_size, 2 * config.num_kv_heads, width)
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.padding_block = num_blocks
        self.layers = [torch.zeros(shape, dtype=self.stored.element, device=device) for _ in range(config.num_layers)]

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks: what a failed step wrote (infinities, NaN) must not reach whoever gets them next."""
        index = torch.tensor(blocks, dtype=torch.int64, device=self.layers[0].device)
        for layer in self.layers:
            # Bytes: not every type of element can be filled.
            layer.view(torch.uint8).index_fill_(0, index, 0)
