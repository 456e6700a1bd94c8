"""How the ranks of a group put their values together, on tensors."""

from typing import Protocol

import torch
import torch.distributed as dist

from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.parallel.shard import Shard, Span


class Collective(Protocol):
    """Every rank calls the same methods in the same order, with tensors of the same shape."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over the ranks of x, float32, the same bits on each of them. x is used up."""

    def gather(self, x: torch.Tensor, columns: Span) -> torch.Tensor:
        """x [S, its columns] of all ranks side by side, [S, all columns], on rank 0; on others, x."""


class Alone:
    """One rank."""

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def gather(self, x: torch.Tensor, columns: Span) -> torch.Tensor:
        return x


class Distributed:
    """torch.distributed: gloo between processes on CPUs, on one host or many; NCCL between GPUs.

    Args:
        shard: this rank.
        config: of the whole model.
        process_group: of all ranks.
    """

    def __init__(self, shard: Shard, config: ModelConfig, process_group: dist.ProcessGroup) -> None:
        self._shard = shard
        self._group = process_group
        self._columns = [other.vocabulary(config) for other in shard.everyone()]
        self._widest = max(span.length for span in self._columns)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self._group)
        return x

    def gather(self, x: torch.Tensor, columns: Span) -> torch.Tensor:
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty(0, columns.total)
        padded = x.new_zeros(rows, self._widest)
        padded[:, : columns.length] = x
        if not self._shard.first:
            dist.gather(padded, None, 0, group=self._group)
            return x
        parts = [torch.empty_like(padded) for _ in self._columns]
        dist.gather(padded, parts, 0, group=self._group)
        return torch.cat([part[:, : span.length] for part, span in zip(parts, self._columns, strict=True)], dim=1)


def embed_part(table: torch.Tensor, tokens: Span, token_ids: torch.Tensor) -> torch.Tensor:
    """A summand of the embedding: rows of `table` [tokens, width] for ids in `tokens`, zeros for others; float32."""
    local = token_ids - tokens.start
    inside = (local >= 0) & (local < tokens.length)
    return torch.where(inside.unsqueeze(-1), table[local.clamp(0, tokens.length - 1)].float(), 0.0)
