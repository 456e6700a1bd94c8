"""What GGUF has otherwise than a checkpoint: rows in another order, matrices the other way round, shapes, and numbers
that are computed. Each change is known both ways. What is what: llama.cpp's conversion scripts."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.gguf.blocks import dequantize
from wherry_runtime.formats.gguf.types import BY_NAME, GGMLType
from wherry_runtime.loading.errors import ModelError

Raw = npt.NDArray[np.uint8]
Values = npt.NDArray[np.float32]
Index = npt.NDArray[np.int64]
Shape = tuple[int, ...]
Config = dict[str, Any]
_F32 = BY_NAME["F32"]


@dataclass(frozen=True)
class Change:
    """Nothing but perhaps the shape changes.

    Attributes:
        shape: of a checkpoint's tensor → GGUF's.
        shape_back: the other way.
    """

    shape: Callable[[Shape], Shape] = lambda shape: shape
    shape_back: Callable[[Shape], Shape] = lambda shape: shape

    def held(self, kind: GGMLType) -> GGMLType:
        """The type of what comes of a tensor of `kind`, both ways."""
        return kind

    def there(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        """A checkpoint's tensor as GGUF has it: bytes → bytes. `shape` is the checkpoint's.

        Raises:
            ModelError: wrong_shape.
        """
        return raw

    def back(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        """The other way; `shape` is the checkpoint's here, too.

        Raises:
            ModelError: wrong_shape.
        """
        return raw


AS_IT_IS = Change()
ONLY_ROW = Change(lambda shape: shape[1:], lambda shape: (1, *shape))  # [1, n] → [n]
COLUMN = Change(lambda shape: (*shape, 1), lambda shape: shape[:-1])  # [n] → [n, 1]
CONVOLUTION = Change(lambda shape: (shape[0], shape[-1]), lambda shape: (shape[0], 1, shape[-1]))  # [n, 1, k] → [n, k]


@dataclass(frozen=True, kw_only=True)
class Rows(Change):
    """Rows in another order.

    Attributes:
        order: for each of so many rows of GGUF's the row of a checkpoint's that it is.
        unit: so many rows there are, or some times so many.
    """

    order: Callable[[int], Index]
    unit: int

    def there(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        return self._moved(raw, self._order(shape))

    def back(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        return self._moved(raw, np.argsort(self._order(shape)))

    def _order(self, shape: Shape) -> Index:
        rows = shape[0] if shape else 1
        if self.unit < 1 or rows % self.unit:
            raise ModelError("wrong_shape", f"{rows} rows where the configuration asks for a multiple of {self.unit}")
        return self.order(rows)

    @staticmethod
    def _moved(raw: Raw, order: Index) -> Raw:
        return raw.reshape(len(order), -1)[order].reshape(-1)


@dataclass(frozen=True)
class Turned(Change):
    """[inputs, outputs] → [outputs, inputs]. Blocks lie along inputs, and become floats when they are turned."""

    shape: Callable[[Shape], Shape] = lambda shape: shape[::-1]
    shape_back: Callable[[Shape], Shape] = lambda shape: shape[::-1]

    def held(self, kind: GGMLType) -> GGMLType:
        return kind if kind.block == 1 else _F32

    def there(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        return self._turned(raw, shape, kind)

    def back(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        return self._turned(raw, shape[::-1], kind)

    def _turned(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        if len(shape) != 2:
            raise ModelError("wrong_shape", f"a matrix is expected, and {list(shape)} is none")
        plain = raw if kind.block == 1 else dequantize(raw, kind).view(np.uint8)
        cells = plain.reshape(*shape, self.held(kind).size)
        return np.ascontiguousarray(cells.swapaxes(0, 1)).reshape(-1)


@dataclass(frozen=True, kw_only=True)
class Computed(Change):
    """Other numbers, in float32.

    Attributes:
        compute: a checkpoint's numbers → GGUF's.
        undo: the other way.
    """

    compute: Callable[[Values], Values]
    undo: Callable[[Values], Values]

    def held(self, kind: GGMLType) -> GGMLType:
        return _F32

    def there(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        return self.compute(dequantize(raw, kind)).view(np.uint8)

    def back(self, raw: Raw, shape: Shape, kind: GGMLType) -> Raw:
        with np.errstate(all="ignore"):
            return self.undo(dequantize(raw, kind)).view(np.uint8)


def increased(by: float) -> Computed:
    """By a number: norms whose weights a checkpoint has without the one that belongs to them."""
    return Computed(compute=lambda values: values + np.float32(by), undo=lambda values: values - np.float32(by))


def _decay(values: Values) -> Values:
    """A state space's decay from its logarithm; float64 in between keeps all of the bits that float32 has."""
    return (-np.exp(values.astype(np.float64))).astype(np.float32)


def _log_decay(values: Values) -> Values:
    return np.log(-values.astype(np.float64)).astype(np.float32)


DECAY = Computed(compute=_decay, undo=_log_decay)
DECAY_COLUMN = Computed(compute=_decay, undo=_log_decay, shape=COLUMN.shape, shape_back=COLUMN.shape_back)


def rows_from_neighbours(rows: int, heads: int) -> Index:
    """For each row of a checkpoint's q or k the row of GGUF's that it is: [rows]."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def rows_to_neighbours(rows: int, heads: int) -> Index:
    """For each row of GGUF's q or k the row of a checkpoint's that it is: [rows]."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def neighbours(heads: int) -> Rows:
    """Rotary dimensions i and i + n/2 of each head side by side."""
    return Rows(order=lambda rows: rows_to_neighbours(rows, heads), unit=2 * heads)


def ungrouped(config: Config) -> Rows:
    """All queries, then all keys, then all values, where each key head has its own queries before it and its values
    behind it."""
    heads, kv_heads = int(config["num_attention_heads"]), int(config["num_key_value_heads"])
    group = heads // kv_heads if kv_heads > 0 else 0

    def order(rows: int) -> Index:
        split = np.arange(rows).reshape(kv_heads, group + 2, -1)
        return np.concatenate([split[:, :group].reshape(-1), split[:, group].reshape(-1), split[:, -1].reshape(-1)])

    return Rows(order=order, unit=kv_heads * (group + 2))


def in_groups(config: Config) -> Change:
    """A norm's weights [n] → [groups, n / groups]."""
    groups = max(int(config.get("n_groups", 8)), 1)
    return Change(lambda shape: (groups, shape[0] // groups), lambda shape: (shape[0] * shape[-1],))
