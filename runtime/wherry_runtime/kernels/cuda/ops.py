"""A model's operations on CUDA: products by cuBLAS where weights are floats, everything else by our kernels."""

from dataclasses import dataclass

import torch
from torch.nn import functional

from wherry_runtime.kernels.cuda.activation import silu_mul
from wherry_runtime.kernels.cuda.attention_decode import Partials, decode_attention
from wherry_runtime.kernels.cuda.attention_prefill import prefill_attention
from wherry_runtime.kernels.cuda.norm import rms_norm
from wherry_runtime.kernels.cuda.quantized_linear import multiply
from wherry_runtime.kernels.cuda.rope_cache import CacheView, rope_and_cache
from wherry_runtime.kernels.cuda.step import Step
from wherry_runtime.layers.activation import Activation
from wherry_runtime.layers.eager import TensorOps
from wherry_runtime.layers.experts import Experts
from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import Norm, RMSNorm
from wherry_runtime.models.ops import Attention
from wherry_runtime.parallel.collective import Collective, embed_part
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.packed import Table, lookup


@dataclass(slots=True, frozen=True)
class Fixed:
    """What stays the same from step to step."""

    layers: list[CacheView]
    block_size: int
    rope: tuple[torch.Tensor, torch.Tensor]  # cos and sin, [positions, head_dim / 2] float32
    programs: int  # that share decode attention, for each key head
    collective: Collective


class CudaOps(TensorOps):
    """`Ops` for one step: values are tensors [T, width]. What has no kernel, PyTorch computes. Nothing here waits for
    the GPU, or depends on a value that is in its memory, so that all of it can be captured in a graph."""

    def __init__(self, fixed: Fixed, step: Step, partials: Partials) -> None:
        super().__init__(step.positions, fixed.collective)
        self._fixed = fixed
        self._step = step
        self._partials = partials

    def embed(self, table: Table, tokens: Span) -> torch.Tensor:
        if tokens.whole:
            return lookup(table, self._step.token_ids)
        return self._collective.all_reduce(embed_part(table, tokens, self._step.token_ids)).to(table.dtype)

    def norm(self, norm: Norm, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, norm.weight, norm.eps) if isinstance(norm, RMSNorm) else norm(x)

    def linear(self, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        if linear.packed is not None:
            return multiply(x, linear.packed, linear.bias)
        return functional.linear(x, _plain(linear), linear.bias)

    def add_linear(self, residual: torch.Tensor, linear: Linear, x: torch.Tensor) -> torch.Tensor:
        if linear.partial:
            y = self.linear(linear, x)
            return residual.add_(self._collective.all_reduce(y.float()).to(y.dtype))
        if linear.packed is not None:
            return multiply(x, linear.packed, linear.bias, residual)
        # cuBLAS adds to what is there: no kernel more, and one rounding less.
        residual.addmm_(x, _plain(linear).t())
        return residual if linear.bias is None else residual.add_(linear.bias)

    def activate(self, activation: Activation, x: torch.Tensor) -> torch.Tensor:
        return silu_mul(x) if activation.kind == "silu" and activation.gated else activation(x)

    def experts(self, experts: Experts, x: torch.Tensor) -> torch.Tensor:
        raise TypeError("the CUDA kernels have no experts")

    def attend(self, attention: Attention, qkv: torch.Tensor) -> torch.Tensor:
        step, fixed = self._step, self._fixed
        cache = fixed.layers[attention.layer]
        rope_and_cache(attention, qkv, fixed.rope, step.positions, step.slots, cache)
        width = attention.num_heads * attention.head_dim
        out = torch.empty(qkv.shape[0], width, dtype=qkv.dtype, device=qkv.device)
        decodes = step.lengths.shape[0]
        if decodes:
            decode_attention(
                *(attention, qkv[:decodes], cache, fixed.block_size, step.memory, step.tables, step.lengths),
                *(step.work[attention.window], self._partials, fixed.programs, out),
            )
        if step.tiles.shape[0]:
            prefill_attention(attention, qkv, cache, fixed.block_size, step.memory, step.tiles, out)
        return out

    def sampled(self, norm: Norm | None, x: torch.Tensor) -> torch.Tensor:
        if isinstance(norm, RMSNorm):
            return rms_norm(x, norm.weight, norm.eps, self._step.sampled_rows)
        rows = x.index_select(0, self._step.sampled_rows)
        return rows if norm is None else norm(rows)

    def logits(self, head: Linear, tokens: Span, x: torch.Tensor) -> torch.Tensor:
        y = self.linear(head, x)
        return y if tokens.whole else self._collective.gather(y, tokens)


def _plain(linear: Linear) -> torch.Tensor:
    if linear.weight is None:
        raise TypeError("a layer without weights")
    return linear.weight
