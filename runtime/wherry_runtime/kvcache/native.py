"""The KV cache as the native CPU kernels read it; kernels/cpu/src/kv.h describes the layout."""

import mmap

import torch

from wherry_runtime.kvcache.formats import KVFormat
from wherry_runtime.kvcache.paged import bytes_per_token
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError

GROUP = 16  # keys that lie together


class NativeKVCache:
    """Keys and values of `num_blocks` blocks of `block_size` tokens, per layer.

    A layer is uint8 [num_blocks + 1, bytes of a block]: a block is one range of bytes, copied or zeroed as a whole.
    Memory is in huge pages where the kernel grants them, starts as zeros, and is taken from the system as it is used.

    Raises:
        ModelError: bad_setting, for a block size or a type of elements that the kernels do not have.
    """

    def __init__(self, config: ModelConfig, num_blocks: int, block_size: int, *, stored: KVFormat) -> None:
        if block_size % GROUP:
            raise ModelError("bad_setting", f"block_size {block_size} is not a multiple of {GROUP}")
        if stored.native is None:
            raise ModelError(
                "bad_setting", f"the native kernels keep no {stored.name} cache; choose another kv_cache_dtype"
            )
        self.stored = stored
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.padding_block = num_blocks
        self._shape = (config.num_kv_heads, config.head_dim)
        block_bytes = bytes_per_token(config, stored, native=True) // config.num_layers * block_size
        self.layers = [
            _zeros((num_blocks + 1) * block_bytes).view(num_blocks + 1, block_bytes) for _ in range(config.num_layers)
        ]

    def scrub(self, blocks: list[int]) -> None:
        """Zeroes blocks: what a failed step wrote (infinities, NaN) must not reach whoever gets them next."""
        index = torch.tensor(blocks, dtype=torch.int64)
        for layer in self.layers:
            layer.index_fill_(0, index, 0)

    def contents(self, layer: int, blocks: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of `blocks` in order, [tokens, num_kv_heads, head_dim] float32 each: for tests and tools."""
        heads, dim = self._shape
        padded, element = -(-dim // GROUP) * GROUP, self.stored.element
        pair = 1 if element == torch.float32 else 2
        groups = self.layers[layer][blocks].view(len(blocks), heads, self.block_size // GROUP, -1)
        scales = torch.ones(2, GROUP, 1)
        if self.stored.scaled:
            scales = groups[..., : 8 * GROUP].contiguous().view(torch.float32).view(*groups.shape[:-1], 2, GROUP, 1)
            groups = groups[..., 8 * GROUP :]
        split = GROUP * dim * element.itemsize
        keys, values = (self._floats(part.contiguous()) for part in (groups[..., :split], groups[..., split:]))
        keys = keys.view(*groups.shape[:-1], dim // pair, GROUP, pair).transpose(-3, -2).flatten(-2)
        values = (
            values.view(*groups.shape[:-1], GROUP // pair, padded, pair).transpose(-2, -1).flatten(-3, -2)[..., :dim]
        )

        def in_order(x: torch.Tensor) -> torch.Tensor:  # [blocks, heads, groups, 16, dim]
            return x.permute(0, 2, 3, 1, 4).reshape(-1, heads, dim)

        return in_order(keys * scales[..., 0, :, :]), in_order(values * scales[..., 1, :, :])

    def _floats(self, codes: torch.Tensor) -> torch.Tensor:
        """Bytes of the layout → float32."""
        if not self.stored.scaled:
            return codes.view(self.stored.element).float()
        return torch.where(codes < 128, 1.0, -1.0) * (codes & 127)  # sign and magnitude


def _zeros(num_bytes: int) -> torch.Tensor:
    """Zeroed memory, on page boundaries; it lives as long as the tensor."""
    memory = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8)
