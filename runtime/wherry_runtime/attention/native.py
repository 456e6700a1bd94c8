"""Attention on the native kernels: what is recorded for a layer, and the memory that it works in.

Operands are described in kernels/cpu/src/attention*.cpp and rope.cpp.
"""

from collections.abc import Sequence
from itertools import chain

import torch

from wherry_runtime.attention.features import beyond_kernels
from wherry_runtime.kernels.cpu.library import Program
from wherry_runtime.kvcache.native import NativeKVCache
from wherry_runtime.layers.norm import Norm, RMSNorm, WholeRMSNorm
from wherry_runtime.layers.rope import Rope
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.models.ops import Attention

__all__ = ["AttentionKernels", "NativeKVCache", "unsupported"]

CHUNK = 256  # keys that are summed up together: attention_plan.h
MOST_GROUP = 128  # query heads per key head
MOST_HEAD_DIM = 256
MOST_PARTIAL_BYTES = 64 << 20
PLAN_HEADER, PLAN_WORDS_PER_ITEM = 8, 12
CACHE_LINE = 64


def unsupported(config: ModelConfig) -> str | None:
    """None, or why the native kernels cannot do this model's attention."""
    if config.head_dim % 2 or config.head_dim > MOST_HEAD_DIM:
        return f"heads of {config.head_dim} columns: the native kernels take even numbers up to {MOST_HEAD_DIM}"
    if config.num_heads // config.num_kv_heads > MOST_GROUP:
        group = config.num_heads // config.num_kv_heads
        return f"{group} query heads share a key head: the native kernels take up to {MOST_GROUP}"
    missing = [
        what
        for has, what in (
            *beyond_kernels(config),
            (config.qk_norm == "heads", "norms with weights of each head"),
            (not config.final_norm, "no norm before the head"),
        )
        if has
    ]
    return f"the native kernels have no {', '.join(missing)}" if missing else None


class AttentionKernels:
    """Rotation, the cache and attention of all layers of a model, for steps of at most `rows` rows.

    The plan, which shares a step's attention out among the threads, is made by the first layer of each window and read
    by the others; queries and partial sums are one layer's at a time, so that one memory serves all.

    Args:
        ropes: the model's, and that of layers with one of their own, if there are any.
    """

    def __init__(
        self, config: ModelConfig, cache: NativeKVCache, ropes: Sequence[Rope], rows: int, threads: int
    ) -> None:
        self._cache = cache
        self._tables = [rope.tables() for rope in ropes]
        self._rows = rows
        self._query = _zeros(rows, -(-config.num_heads * config.head_dim // 64) * 64)
        self._most_items = 2 * rows + 16 * threads
        self._plans: dict[int, torch.Tensor] = {}
        # Where a long sequence's chunks meet. With less it would be split less.
        width = -(-config.head_dim // 16) * 16 + 16
        chunks = -(-len(self._tables[0][0]) // CHUNK)
        wanted = 4 * threads * (config.num_heads // config.num_kv_heads) * chunks
        self._most_partials = max(1, min(wanted, MOST_PARTIAL_BYTES // (4 * width)))
        self._partials = _zeros(self._most_partials, width)

    @property
    def num_bytes(self) -> int:
        """Memory besides the cache."""
        tensors = (*chain(*self._tables), self._query, self._partials, *self._plans.values())
        return sum(t.numel() * t.itemsize for t in tensors)

    def record(
        self, program: Program, attention: Attention, qkv: tuple[torch.Tensor, int], out: tuple[torch.Tensor, int]
    ) -> None:
        """Appends the calls of one layer.

        Args:
            program: layers are recorded in the order in which they run; the first of each window makes its plan.
            attention: the layer's shape.
            qkv: float32 [rows, stride] and the stride: heads of queries, of keys, of values.
            out: float32 [rows, stride] and the stride: heads of queries.
        """
        heads = [attention.num_heads, attention.num_kv_heads]
        window = attention.window or 0
        plan = self._plan(program, heads, window)
        layer = self._cache.layers[attention.layer]
        query_norm, key_norm = _rms(attention.query_norm), _rms(attention.key_norm)
        if isinstance(query_norm, WholeRMSNorm):
            self._norm_whole(program, attention, qkv)
            query_norm = key_norm = None
        norms = [None if n is None else n.weight for n in (query_norm, key_norm)]
        if any(w is not None and w.dtype != torch.float32 for w in norms):
            raise TypeError("the native kernels take norms in float32")
        stride, stored = self._query.shape[1], self._cache.stored.native or 0
        shape = [*heads, attention.head_dim, self._cache.block_size, stored]
        eps = 0.0 if query_norm is None else query_norm.eps
        program.add(
            "rope_and_cache",
            [qkv[0], *norms, *self._tables[attention.local_rope], layer, self._query],
            [*shape, qkv[1], stride],
            [eps, attention.score_scale, attention.clip or 0],
        )
        program.add(
            "attention",
            [self._query, layer, plan, self._partials, out[0], attention.slopes],
            [*shape, stride, out[1], window, self._most_items],
            [attention.softcap or 0],
        )

    def _norm_whole(self, program: Program, attention: Attention, qkv: tuple[torch.Tensor, int]) -> None:
        """Norms of all queries together, and of all keys, where they are."""
        start, (rows, stride) = 0, qkv
        for norm in (_rms(attention.query_norm), _rms(attention.key_norm)):
            if norm is not None:
                width, part = len(norm.weight), rows[:, start:]
                program.add("rms_norm", [part, norm.weight, part], [width, stride, stride, 0], [norm.eps])
                start += width

    def _plan(self, program: Program, heads: list[int], window: int) -> torch.Tensor:
        if window not in self._plans:
            plan = torch.zeros(PLAN_HEADER + PLAN_WORDS_PER_ITEM * self._most_items, dtype=torch.int64)
            program.add("attention_plan", [plan], [*heads, self._most_partials, window, self._most_items])
            self._plans[window] = plan
        return self._plans[window]


def _rms(norm: Norm | None) -> RMSNorm | None:
    if norm is not None and not isinstance(norm, RMSNorm):
        raise TypeError(f"the native kernels have no {type(norm).__name__}")
    return norm


def _zeros(rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] float32 that begins on a cache line."""
    raw = torch.zeros(rows * columns * 4 + CACHE_LINE, dtype=torch.uint8)
    start = -raw.data_ptr() % CACHE_LINE
    return raw[start : start + rows * columns * 4].view(torch.float32).view(rows, columns)
