"""Which part of a model a rank holds. Pure.

Matrices are split as in Megatron-LM (Shoeybi et al., 2019, https://arxiv.org/abs/1909.08053): the first of each pair by
its outputs, the second by its inputs, so that a layer's ranks meet twice: after attention and after the MLP. Embedding
and head are split by vocabulary. Heads of keys and values are split like those of queries; where there are fewer than
ranks, several ranks hold the same one.
"""

from dataclasses import dataclass

import msgspec

from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.errors import ModelError

# What inputs are quantized in at most: where shares begin and end on these, a rank's scales are those of the whole.
MLP_UNIT = 128
VOCABULARY_UNIT = 64  # a panel of the native kernels, which is written whole


@dataclass(frozen=True, slots=True)
class Span:
    """Indices `start` … `stop` - 1 of `total`."""

    start: int
    stop: int
    total: int

    @classmethod
    def all(cls, total: int) -> "Span":
        """All of them."""
        return cls(0, total, total)

    @property
    def length(self) -> int:
        return self.stop - self.start

    @property
    def whole(self) -> bool:
        """Whether nothing is left out."""
        return self.length == self.total

    @property
    def indices(self) -> slice:
        return slice(self.start, self.stop)

    def times(self, width: int) -> "Span":
        """The same in columns, `width` for each index."""
        return Span(self.start * width, self.stop * width, self.total * width)


@dataclass(frozen=True, slots=True)
class Shard:
    """Rank `rank` of `size`."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def span(self, total: int, unit: int = 1) -> Span:
        """This rank's contiguous share, in multiples of `unit` where there are enough for everybody; the shares differ
        by one unit at most."""
        if total < unit * self.size:
            unit = 1
        units = -(-total // unit)
        start, stop = (units * rank // self.size * unit for rank in (self.rank, self.rank + 1))
        return Span(start, min(stop, total), total)

    def everyone(self) -> "list[Shard]":
        """Every rank's, in order, this one's included."""
        return [Shard(rank, self.size) for rank in range(self.size)]

    def heads(self, config: ModelConfig) -> Span:
        """Heads of queries."""
        return self.span(config.num_heads)

    def kv_heads(self, config: ModelConfig) -> Span:
        """Heads of keys and values."""
        total = config.num_kv_heads
        if total >= self.size:
            return self.span(total)
        only = self.rank * total // self.size
        return Span(only, only + 1, total)

    def mlp(self, config: ModelConfig) -> Span:
        """Columns of the MLP's inner activations."""
        return self.mlp_span(config.intermediate_size)

    def mlp_span(self, width: int) -> Span:
        """Of `width` inner activations."""
        return self.span(width, MLP_UNIT)

    def vocabulary(self, config: ModelConfig) -> Span:
        """Rows of embedding and head."""
        return self.span(config.vocab_size, VOCABULARY_UNIT)

    def part(self, config: ModelConfig) -> ModelConfig:
        """The configuration of what this rank computes by itself; the vocabulary stays whole."""
        if self.size == 1:
            return config
        return msgspec.structs.replace(
            config,
            num_heads=self.heads(config).length,
            num_kv_heads=self.kv_heads(config).length,
            intermediate_size=self.mlp(config).length,
        )


def check(config: ModelConfig, size: int) -> None:
    """Whether the model can be split over `size` ranks.

    Raises:
        ModelError: bad_setting, with the numbers of ranks that it can be split over.
    """
    if size > 1 and (reason := unsplittable(config)) is not None:
        raise ModelError("bad_setting", f"{config.architecture} cannot be split over {size} ranks: {reason}")
    if size < 1 or not _divides(config, size):
        possible = ", ".join(str(n) for n in range(1, config.num_heads + 1) if _divides(config, n))
        raise ModelError(
            "bad_setting",
            f"a model with {config.num_heads} heads of queries and {config.num_kv_heads} of keys cannot be split over "
            f"{size} ranks; it can over {possible}",
        )


def unsplittable(config: ModelConfig) -> str | None:
    """None, or why no number of ranks can share the model."""
    if config.encoder is not None:
        return "each replica computes an embedding model whole; add replicas instead"
    if config.recurrent is not None:
        return "it has no heads of attention to share out"
    if config.qk_norm == "whole":
        return "its queries and keys are normalized over all heads together"
    if config.sub_norms:
        return "it has norms between the matrices that ranks would split"
    return None


def _divides(config: ModelConfig, size: int) -> bool:
    heads, kv_heads = config.num_heads, config.num_kv_heads
    # A rank's queries must find their keys at home, each head of keys having as many.
    fits = kv_heads % size == 0 if kv_heads >= size else size % kv_heads == 0
    return heads % size == 0 and fits and config.vocab_size >= VOCABULARY_UNIT * size
