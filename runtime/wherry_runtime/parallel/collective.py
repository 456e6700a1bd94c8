"""How the ranks of a group put their values together, on tensors."""

from typing import Protocol

import torch

from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.packed import Table, lookup


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


def embed_part(table: Table, tokens: Span, token_ids: torch.Tensor) -> torch.Tensor:
    """A summand of the embedding: rows of `table` [tokens, width] for ids in `tokens`, zeros for others; float32."""
    local = token_ids - tokens.start
    inside = (local >= 0) & (local < tokens.length)
    return torch.where(inside.unsqueeze(-1), lookup(table, local.clamp(0, tokens.length - 1)).float(), 0.0)
