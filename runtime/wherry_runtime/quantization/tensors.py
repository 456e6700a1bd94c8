"""What PyTorch has without types."""

import torch


def split(x: torch.Tensor, dim: int, sizes: tuple[int, ...]) -> torch.Tensor:
    """`x` with one dimension as several; one of `sizes` may be -1."""
    result: torch.Tensor = torch.unflatten(x, dim, sizes)
    return result
