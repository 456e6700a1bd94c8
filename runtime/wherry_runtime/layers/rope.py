"""Rotary position embedding: Su et al., 2021 (https://arxiv.org/abs/2104.09864), in the half-split layout of Llama.

Where a model rotates only a part of each head, or neighbours, its queries and keys are loaded in another order
(`RopeConfig.order`), so that this is the only layout at run time; what does not rotate has an angle of zero.
"""

import functools
import math

import torch

from wherry_runtime.loading.rope_config import RopeConfig

POSITIONS_AT_ONCE = 8192  # whose angles are computed together: bounds what they take beside the tables


def inverse_frequencies(config: RopeConfig, head_dim: int, num_positions: int = 0) -> torch.Tensor:
    """[rotary_dim / 2] float32: the angle that one position adds, for each pair of dimensions that rotate.

    Args:
        num_positions: the served context, which longrope's factors depend on.
    """
    width = config.rotary_dim(head_dim)
    exponents = torch.arange(0, width, 2, dtype=torch.int64).to(torch.float32) / width
    frequencies = 1.0 / (config.rope_theta**exponents)
    if config.rope_type == "linear":
        return frequencies / config.factor
    if config.rope_type == "llama3":
        return _llama3(config, frequencies)
    if config.rope_type == "yarn":
        return _yarn(config, frequencies)
    if config.rope_type == "longrope":
        long = num_positions > config.original_max_position_embeddings
        return frequencies / torch.tensor(config.long_factor if long else config.short_factor)
    return frequencies


def magnitude(config: RopeConfig) -> float:
    """What cosines and sines are multiplied by: yarn and longrope make up for longer contexts with it."""
    if config.attention_factor is not None and config.rope_type in ("yarn", "longrope"):
        return config.attention_factor
    if config.rope_type == "yarn":
        if config.mscale and config.mscale_all_dim:
            return _mscale(config.factor, config.mscale) / _mscale(config.factor, config.mscale_all_dim)
        return _mscale(config.factor, 1.0)
    if config.rope_type == "longrope" and config.factor > 1:
        return math.sqrt(1 + math.log(config.factor) / math.log(config.original_max_position_embeddings))
    return 1.0


def _mscale(factor: float, mscale: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _llama3(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    context = config.original_max_position_embeddings
    wavelengths = 2 * math.pi / frequencies
    blend = (context / wavelengths - config.low_freq_factor) / (config.high_freq_factor - config.low_freq_factor)
    blended = (1 - blend) * frequencies / config.factor + blend * frequencies
    stretched = torch.where(wavelengths > context / config.low_freq_factor, frequencies / config.factor, blended)
    return torch.where(wavelengths < context / config.high_freq_factor, frequencies, stretched)


def _yarn(config: RopeConfig, frequencies: torch.Tensor) -> torch.Tensor:
    """YaRN: dimensions that turn more than `beta_fast` times in the original context keep their frequency, those that
    turn less than `beta_slow` times are stretched by `factor`, those between blended."""
    width = 2 * len(frequencies)

    def dimension(turns: float) -> float:
        ratio = config.original_max_position_embeddings / (turns * 2 * math.pi)
        return width * math.log(ratio) / (2 * math.log(config.rope_theta))

    low, high = dimension(config.beta_fast), dimension(config.beta_slow)
    if config.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    span = high - low or 0.001
    stretched = ((torch.arange(width // 2, dtype=torch.float32) - low) / span).clamp(0, 1)
    return frequencies / config.factor * stretched + frequencies * (1 - stretched)


class Rope:
    """Tables of cosine and sine for `num_positions` positions.

    With x = (a, b) split in halves, the rotation is (a·cos − b·sin, b·cos + a·sin). That is x·cos + roll(x)·sin' where
    roll swaps the halves and sin' carries the sign, so it takes two products and no concatenation.

    Args:
        config: None: nothing is rotated.
    """

    def __init__(
        self, config: RopeConfig | None, head_dim: int, num_positions: int, *, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._inputs = (config, head_dim, num_positions)
        self.rotates = config is not None
        self._type = (device, dtype)
        self._half = head_dim // 2

    @functools.cached_property
    def _rows(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and signed sin of every position, for both halves; made when they are first asked for: the native kernels
        have their own."""
        cos, sin = self.tables()
        return torch.cat((cos, cos), dim=-1).to(*self._type), torch.cat((-sin, sin), dim=-1).to(*self._type)

    def tables(self) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin of every position, [num_positions, head_dim / 2] float32 each, whatever the model's type."""
        config, head_dim, num_positions = self._inputs
        if config is None:
            return torch.ones(num_positions, head_dim // 2), torch.zeros(num_positions, head_dim // 2)
        frequencies = inverse_frequencies(config, head_dim, num_positions)
        width, factor = len(frequencies), magnitude(config)
        cos, sin = torch.empty(num_positions, head_dim // 2), torch.empty(num_positions, head_dim // 2)
        cos[:, width:], sin[:, width:] = 1, 0
        for start in range(0, num_positions, POSITIONS_AT_ONCE):
            part = slice(start, min(start + POSITIONS_AT_ONCE, num_positions))
            angles = torch.outer(torch.arange(start, part.stop, dtype=torch.float32), frequencies)
            cos[part, :width] = angles.cos().mul_(factor)
            sin[part, :width] = angles.sin_().mul_(factor)
        return cos, sin

    def at(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T] int64 → cos and signed sin, [T, 1, head_dim] each: once per step, for all layers."""
        cos, sin = self._rows
        return cos.index_select(0, positions).unsqueeze(1), sin.index_select(0, positions).unsqueeze(1)

    def rotate_(self, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> None:
        """Rotates x [T, heads, head_dim] in place."""
        rolled = x.roll(self._half, -1)
        x.mul_(cos).addcmul_(rolled, sin)
