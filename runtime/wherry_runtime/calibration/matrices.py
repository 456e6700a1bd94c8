"""The matrices of a checkpoint, as it has them, in a model that holds them cut, joined or in another order."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.recurrent import RecurrentLayer
from wherry_runtime.models.decoder import DecoderLayer
from wherry_runtime.models.layout import Origin

Layer = DecoderLayer | RecurrentLayer


@dataclass(frozen=True, eq=False)
class Matrix:
    """One that is quantized. All of its rows are in one product: others' rows may be there as well.

    Attributes:
        name: in the checkpoint, without `.weight`.
        rows: [N] int64: which rows of `linear` they are, in the checkpoint's order.
    """

    name: str
    linear: Linear
    rows: torch.Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """N, K."""
        return len(self.rows), self.linear.num_inputs

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return self._held().dtype

    def weights(self) -> torch.Tensor:
        """[N, K] float32, of its own memory."""
        return self._held()[self.rows].float()

    def put(self, weights: torch.Tensor) -> None:
        """Takes weights [N, K] in the place of those that are there."""
        held = self._held()
        held[self.rows] = weights.to(held.dtype)

    def _held(self) -> torch.Tensor:
        if self.linear.weight is None:
            raise TypeError("packed weights cannot be quantized again")
        return self.linear.weight


def linears(layer: Layer) -> Iterator[Linear]:
    """Products whose matrices are quantized: not those that decide, which take little room."""
    return (part for part in layer.parts() if isinstance(part, Linear) and part.role != "head")


def kept(layer: Layer) -> Iterator[Linear]:
    """Products whose matrices stay as they are."""
    return (part for part in layer.parts() if isinstance(part, Linear) and part.role == "head")


def matrices(linear: Linear, origins: dict[str, Origin]) -> list[Matrix]:
    """Those that a product is made of.

    Args:
        origins: of the model that it belongs to.
    """
    parts: dict[str, list[tuple[torch.Tensor, slice]]] = {}
    for own, part in linear.rows.items():
        origin = origins[own]
        parts.setdefault(origin.name, []).append((origin.rows, part))
    found = []
    for name, places in parts.items():
        rows = torch.empty(sum(len(numbers) for numbers, _ in places), dtype=torch.int64)
        for numbers, part in places:
            rows[numbers] = torch.arange(part.start, part.stop)
        found.append(Matrix(name, linear, rows))
    return found
