"""Rotary position embedding: Su et al., 2021 (https://arxiv.org/abs/2104.09864), in the half-split layout of Llama."""

import math

import torch

from wherry_runtime.loading.config import RopeConfig


def inverse_frequencies(config: RopeConfig, head_dim: int) -> torch.Tensor:
    """[head_dim / 2] float32: the angle that one position adds, for each pair of dimensions."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_type == "linear":
        return frequencies / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, frequencies)
    return frequencies


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    context = config.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    blend = (context / wavelengths - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - blend) * frequencies / config.factor + blend * frequencies
    stretched = torch.where(wavelengths > context / config.low_freq_factor, frequencies / config.factor, blended)
    return torch.where(wavelengths < context / config.high_freq_factor, frequencies, stretched)


class Rope:
    """Tables of cosine and sine for `num_positions` positions.

    With x = (a, b) split in halves, the rotation is (a·cos − b·sin, b·cos + a·sin). That is x·cos + roll(x)·sin' where
    roll swaps the halves and sin' carries the sign, so it takes two products and no concatenation.
    """

    def __init__(
        self, config: RopeConfig, head_dim: int, num_positions: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._inputs = (config, head_dim, num_positions)
        angles = self._angles()
        self._cos = torch.cat((angles.cos(), angles.cos()), dim=-1).to(device, dtype)
        self._sin = torch.cat((-angles.sin(), angles.sin()), dim=-1).to(device, dtype)
        self._half = head_dim // 2

    def _angles(self) -> torch.Tensor:
        config, head_dim, num_positions = self._inputs
        return torch.outer(torch.arange(num_positions, dtype=torch.float32), inverse_frequencies(config, head_dim))

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position, [num_positions, head_dim / 2] float32 each, whatever the model's type."""
        angles = self._angles()
        return angles.cos(), angles.sin()

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] int64 → cos and signed sin, [T, 1, head_dim] each: once per step, for all layers."""
        return self._cos.index_select(0, positions).unsqueeze(1), self._sin.index_select(0, positions).unsqueeze(1)

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotates x [T, heads, head_dim] in place."""
        rolled = x.roll(self._half, -1)
        x.mul_(cos).addcmul_(rolled, sin)
