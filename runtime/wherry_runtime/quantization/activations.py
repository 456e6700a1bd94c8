"""Activations in int8, scaled as they come: per row and group of inputs."""

import torch

from wherry_runtime.quantization.tensors import split


def quantize_activations(x: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounds to nearest (ties to even) against each group's largest magnitude.

    Args:
        x: [T, K], K a multiple of `group`.

    Returns:
        [T, K / group, group] float32 of integers in [-127, 127], and [T, K / group] float32 scales.
    """
    grouped = split(x.float(), -1, (-1, group))
    top = grouped.abs().amax(dim=-1)
    # A true quotient: PyTorch takes number / tensor for number · (1 / tensor), which is another float at times.
    inverse = torch.where(top > 0, torch.full_like(top, 127) / top, 0.0)
    return (grouped * inverse.unsqueeze(-1)).round_(), top / 127
