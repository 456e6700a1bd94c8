"""What recurrent layers are made of besides matrices and norms."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch.nn import functional

from wherry_runtime.layers.linear import Linear, Slot, Slots
from wherry_runtime.layers.linear import State as Weights
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.recurrent_config import RecurrentConfig
from wherry_runtime.quantization.storage import Storage

# Of a layer and B sequences: tensors [B, …], in the order of the layer's `kept`.
States = tuple[torch.Tensor, ...]


class Kept(NamedTuple):
    """One tensor of a layer's state of a sequence: float32 of `shape`, filled with `initial` before the first token."""

    shape: tuple[int, ...]
    initial: float = 0.0


class RecurrentLayer(Protocol):
    """A layer of a model without attention."""

    def __init__(self, name: str, config: ModelConfig, shape: RecurrentConfig, storage: Storage) -> None:
        """`name`: what the layer's tensors begin with."""

    @property
    def kept(self) -> Sequence[Kept]:
        """What it keeps of a sequence."""

    def parts(self) -> Sequence["Part"]:
        """Everything that holds weights."""

    def __call__(self, x: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        """L tokens of each of B sequences: x [B, L, hidden_size], states after the tokens before → the same after."""


class Part(Protocol):
    """Something with weights."""

    def slots(self) -> Slots: ...

    def state(self) -> Weights: ...


class Parameter:
    """A small tensor of the checkpoint, by its whole name; used in float32.

    Attributes:
        value: of `shape`.
    """

    def __init__(self, name: str, shape: tuple[int, ...], storage: Storage) -> None:
        self.value = torch.empty(shape, dtype=torch.float32, device=storage.device)
        self._name = name

    def slots(self) -> Slots:
        return {self._name: Slot.of(self.value)}

    def state(self) -> Weights:
        return {self._name: self.value}


class CausalConvolution:
    """Each channel's sum over the last `kernel` tokens, then SiLU.

    Args:
        name: of its tensors `weight` [channels, 1, kernel] and, with `bias`, `bias` [channels].
    """

    def __init__(self, name: str, channels: int, kernel: int, *, bias: bool, storage: Storage) -> None:
        self.weight = Parameter(f"{name}.weight", (channels, 1, kernel), storage)
        self.bias = Parameter(f"{name}.bias", (channels,), storage) if bias else None
        self.kept = Kept((channels, kernel - 1))

    def parts(self) -> list[Parameter]:
        return [self.weight] if self.bias is None else [self.weight, self.bias]

    def __call__(self, x: torch.Tensor, before: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [B, L, channels] and the tokens before it [B, channels, kernel - 1] → [B, L, channels] float32, and the
        last tokens."""
        seen = torch.cat((before, x.float().transpose(1, 2)), dim=-1)
        bias = None if self.bias is None else self.bias.value
        y = functional.conv1d(seen, self.weight.value, bias, groups=seen.shape[1])
        return functional.silu(y).transpose(1, 2), seen[..., seen.shape[-1] - before.shape[-1] :]


def project(linear: Linear, x: torch.Tensor) -> torch.Tensor:
    """x [B, L, inputs] of any dtype → [B, L, outputs] in the model's."""
    rows = x.flatten(0, 1)
    y = linear(rows if linear.weight is None else rows.to(linear.dtype))
    return y.view(*x.shape[:-1], y.shape[-1])
