"""Normalization: by the root mean square (Zhang and Sennrich, 2019, https://arxiv.org/abs/1910.07467), or layer
normalization (Ba et al., 2016, https://arxiv.org/abs/1607.06450)."""

from typing import Protocol

import torch
from torch.nn import functional

from wherry_runtime.layers.linear import Slot, Slots, State
from wherry_runtime.parallel.shard import Span


class Norm(Protocol):
    """A norm with its weights, if it has any."""

    def slots(self) -> Slots: ...

    def state(self) -> State: ...

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] → the same shape and dtype."""


class RMSNorm:
    """y = x / sqrt(mean(x²) + eps) · w over the last dimension.

    Args:
        offset: added to the checkpoint's weights; the sum is kept in float32, as the weights are small beside it.
    """

    def __init__(
        self, name: str, width: int, eps: float, *, dtype: torch.dtype, device: torch.device, offset: float = 0.0
    ) -> None:
        self.weight = torch.empty(width, dtype=torch.float32 if offset else dtype, device=device)
        self.eps = eps
        self.offset = offset
        self._name = name

    def slots(self) -> Slots:
        return {f"{self._name}.weight": Slot(tuple(self.weight.shape), self._fill)}

    def _fill(self, weight: torch.Tensor) -> None:
        self.weight.copy_(weight)
        if self.offset:
            self.weight += self.offset

    def state(self) -> State:
        return {f"{self._name}.weight": self.weight}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] → the same shape and dtype."""
        if x.dtype != self.weight.dtype:
            return functional.rms_norm(x.float(), (x.shape[-1],), self.weight.float(), self.eps).to(x.dtype)
        return functional.rms_norm(x, (x.shape[-1],), self.weight, self.eps)


class WholeRMSNorm(RMSNorm):
    """Over all heads together: x [..., heads, head_dim]."""

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return super().__call__(x.flatten(-2)).view_as(x)


class LayerNorm:
    """y = (x - mean(x)) / sqrt(var(x) + eps) · w + b over the last dimension.

    Args:
        width: of x.
        heads: each head, the dimension before the last, has weights of its own: those of `heads` are here.
    """

    def __init__(
        self,
        name: str,
        width: int,
        eps: float,
        *,
        dtype: torch.dtype,
        device: torch.device,
        weight: bool = True,
        bias: bool = True,
        heads: Span | None = None,
    ) -> None:
        shape = (width,) if heads is None else (heads.length, width)
        self.weight = torch.empty(shape, dtype=dtype, device=device) if weight else None
        self.bias = torch.empty(shape, dtype=dtype, device=device) if bias else None
        self.eps = eps
        self._heads = heads
        self._name = name

    def slots(self) -> Slots:
        return {name: self._slot(tensor) for name, tensor in self.state().items()}

    def _slot(self, tensor: torch.Tensor) -> Slot:
        return (
            Slot.of(tensor) if self._heads is None else Slot.part(self._heads, Span.all(tensor.shape[1]), tensor.copy_)
        )

    def state(self) -> State:
        both = {f"{self._name}.weight": self.weight, f"{self._name}.bias": self.bias}
        return {name: tensor for name, tensor in both.items() if tensor is not None}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., width] → the same shape and dtype."""
        shape = (x.shape[-1],)
        if self._heads is None and self._fits(x):
            return functional.layer_norm(x, shape, self.weight, self.bias, self.eps)
        y = functional.layer_norm(x.float(), shape, None, None, self.eps)
        if self.weight is not None:
            y = y * self.weight
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def _fits(self, x: torch.Tensor) -> bool:
        return all(tensor.dtype == x.dtype for tensor in (self.weight, self.bias) if tensor is not None)
