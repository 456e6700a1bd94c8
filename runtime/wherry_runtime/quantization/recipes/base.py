"""What a method of quantizing a checkpoint is."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import torch

from wherry_runtime.quantization.layouts.base import Writer
from wherry_runtime.quantization.rounding import Grid
from wherry_runtime.quantization.solvers.inputs import Inputs

Shapes = Sequence[tuple[int, int]]  # [N, K] of every matrix that is quantized


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """How a method is used.

    Attributes:
        bits, group: of weights; 0 where the method has no choice.
        symmetric: steps around zero, which kernels run in as many bits; else around a zero point.
        act_order: the columns with the largest activations are rounded first.
        true_sequential: a layer's matrices see what rounding those before them in the same layer did.
        damping: share of the mean diagonal that is added to a Hessian's.
        smoothing: how much of the activations' range goes into the weights, from 0 to 1.
        sparsity: share of weights that become zero; 0: the method's own.
        bits_per_weight: on average, scales included, each matrix having as many as it is worth; 0: all have equal ones.
        outliers: activations of at least this magnitude are multiplied apart; 0: the method's own.
    """

    bits: int = 0
    group: int = 0
    symmetric: bool = True
    act_order: bool = True
    true_sequential: bool = True
    damping: float = 0.01
    smoothing: float = 0.5
    sparsity: float = 0.0
    bits_per_weight: float = 0.0
    outliers: float = 0.0

    @property
    def grid(self) -> Grid:
        return Grid(self.bits, self.group, self.symmetric)


class Rounded(Protocol):
    """A matrix as a method left it."""

    def dequantized(self) -> torch.Tensor:
        """[N, K] float32."""


class Scales(Protocol):
    """Finds [K] factors of a matrix's inputs that are worth more in the weights than in what comes before.

    `tied` [K] int64: inputs of an equal number have an equal factor.
    """

    def __call__(
        self, weights: torch.Tensor, inputs: Inputs, settings: Settings, tied: torch.Tensor | None
    ) -> torch.Tensor: ...


@dataclass(frozen=True, slots=True)
class Recipe:
    """A method. A module here that has one as `RECIPE` is all it takes to add it.

    Attributes:
        name: what users call it.
        summary: one line for them.
        round: weights [N, K] float32 and what is known of their inputs → what the writer takes.
        writer: how a checkpoint with matrices of these shapes is written; None: as plain weights.
        bits, groups: what there is to choose from, the first by default; empty: nothing.
        calibrates: it looks at inputs, so it needs a text.
        zero_points: it can have steps around a zero point.
        sparsity: share of weights that it makes zero, by default; 0: there is no choice of it.
        outliers: the magnitude from which on it keeps activations apart, by default; 0: it keeps none.
        scales: finds factors to fold into what comes before, for each matrix for which that is possible.
        offers: settings that `auto` tries.
        mixes: settings that matrices of one checkpoint may differ in; sensitivity is measured with the first.
    """

    name: str
    summary: str
    round: Callable[[torch.Tensor, Inputs, Settings], Any]
    writer: Callable[[Settings, Shapes], Writer | None]
    bits: tuple[int, ...] = ()
    groups: tuple[int, ...] = ()
    calibrates: bool = False
    zero_points: bool = False
    sparsity: float = 0.0
    outliers: float = 0.0
    scales: Scales | None = None
    offers: tuple[Settings, ...] = ()
    mixes: tuple[Settings, ...] = ()

    def mixed(self, settings: Settings, place: int) -> Settings:
        """`settings` with the bits and the group of one of `mixes`."""
        return msgspec.structs.replace(settings, bits=self.mixes[place].bits, group=self.mixes[place].group)

    def settled(self, settings: Settings) -> Settings:
        """`settings` with this method's defaults.

        Raises:
            ValueError: it does not have what was asked for.
        """
        self._check_mix(settings)
        if settings.sparsity and not self.sparsity:
            raise ValueError(f"{self.name} has no choice of sparsity; leave out --sparsity")
        if not 0 <= settings.sparsity < 1:
            raise ValueError("sparsity lies between 0 and 1")
        if settings.outliers and (not self.outliers or settings.outliers < 0):
            raise ValueError(f"{self.name} keeps no outliers of {settings.outliers:g} apart; leave out --outliers")
        chosen: dict[str, float] = {
            "sparsity": settings.sparsity or self.sparsity,
            "outliers": settings.outliers or self.outliers,
        }
        for field, known in (("bits", self.bits), ("group", self.groups)):
            value = getattr(settings, field)
            if value and value not in known:
                listed = ", ".join(map(str, known)) or "no choice of it"
                raise ValueError(f"{self.name} has no {field} {value}; it has {listed}")
            chosen[field] = value or (known[0] if known and not settings.bits_per_weight else 0)
        if not settings.symmetric and not self.zero_points:
            raise ValueError(f"{self.name} has no zero points; leave out --asymmetric")
        if not 0 < settings.damping < 1 or not 0 <= settings.smoothing <= 1:
            raise ValueError("damping lies between 0 and 1, smoothing in 0 to 1")
        return msgspec.structs.replace(settings, **chosen)

    def _check_mix(self, settings: Settings) -> None:
        if settings.bits_per_weight < 0:
            raise ValueError("bits per weight are above zero")
        if settings.bits_per_weight and not self.mixes:
            raise ValueError(f"{self.name} has the same bits for all matrices; leave out --bits-per-weight")
        if settings.bits_per_weight and (settings.bits or settings.group or not settings.symmetric):
            raise ValueError("--bits-per-weight chooses bits and groups, around zero; leave out the others")
