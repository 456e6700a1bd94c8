"""Names and numbers of the weight formats."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

Method = Literal["float32", "bfloat16", "int8", "int4", "k4", "k5", "k6", "ternary"]

PANEL = 64  # output columns that lie together
INPUT_MULTIPLE = 128  # rows of a panel are padded to this, so that whole groups fit whatever their size
GROUPS = (32, 64, 128)
K_GROUPS = (16, 32)
SUPER_BLOCKS = (32, 256)


def padded_inputs(width: int) -> int:
    """Columns that `width` values take as the input of a product."""
    return -(-width // INPUT_MULTIPLE) * INPUT_MULTIPLE


_KINDS: dict[Method, int] = {"float32": 0, "bfloat16": 1, "int8": 2, "int4": 3}  # that the kernels quantize to
_BITS: dict[Method, int] = {
    "float32": 32,
    "bfloat16": 16,
    "int8": 8,
    "k6": 6,
    "k5": 5,
    "k4": 4,
    "int4": 4,
    "ternary": 2,
}
_OF_BITS: dict[int, Method] = {4: "k4", 5: "k5", 6: "k6"}


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix is held. `group` weights along the input share a scale; 0: the method has no scales.

    `k4`, `k5` and `k6` have scales in two levels, as GGUF's K-quants do: w = (d · s) q - (d_min · m), where d and d_min
    are float16 and shared by the `block` weights of a super-block, s and m int8 and shared by the `group`.

    Attributes:
        block: weights of a super-block; 0: the method has none.
        zero: what is added to q so that it is not negative.
        minima: whether there are d_min and m.
        outliers: activations of at least this magnitude are not rounded to int8 with others but multiplied as they are
            (LLM.int8, https://arxiv.org/abs/2208.07339); 0: all are rounded. Of int8 weights only.
    """

    method: Method
    group: int = 0
    block: int = 0
    zero: int = 0
    minima: bool = False
    outliers: float = 0.0

    def __post_init__(self) -> None:
        groups = K_GROUPS if self.two_level else GROUPS if self.quantized else (0,)
        if self.group not in groups:
            raise ValueError(f"{self.method} weights have no groups of {self.group}")
        if self.block not in (SUPER_BLOCKS if self.two_level else (0,)):
            raise ValueError(f"{self.method} weights have no super-blocks of {self.block}")
        if self.outliers and (self.method != "int8" or not self.outliers > 0):
            raise ValueError(f"{self.method} weights have no outliers of {self.outliers} kept apart")

    @classmethod
    def two_level_of(cls, least: int, most: int, group: int, block: int, *, minima: bool) -> "Format":
        """The one with fewest bits whose q may be `least` … `most`."""
        bits = max(4, (most - least).bit_length())
        return cls(_OF_BITS[bits], group, block, -least, minima)

    @property
    def quantized(self) -> bool:
        return self.two_level or self.method in ("int8", "int4", "ternary")

    @property
    def two_level(self) -> bool:
        """Whether it has super-blocks."""
        return self.method in ("k4", "k5", "k6")

    @property
    def kind(self) -> int:
        """The format's number in the native library, for those that floats are rounded to."""
        return _KINDS[self.method]

    @property
    def bits(self) -> int:
        """Of a weight, without scales; of ternary ones, which take 1.625, as whole ones."""
        return _BITS[self.method]

    @property
    def bits_per_weight(self) -> float:
        """With scales."""
        levels = 1 + self.minima
        if self.two_level:
            return self.bits + levels * (8 / self.group + 16 / self.block)
        return self.bits + (16 / self.group if self.group else 0)

    def cut_at(self, column: int) -> "Format | None":
        """The format of what begins at a column of a matrix in this one; None if that is inside a group."""
        if not self.two_level:
            return self if not self.group or column % self.group == 0 else None
        if column % self.block == 0:
            return self
        return replace(self, block=SUPER_BLOCKS[0]) if column % SUPER_BLOCKS[0] == 0 else None

    def __str__(self) -> str:
        name = f"{self.method}-g{self.group}" if self.group else self.method
        name += f"-outliers{self.outliers:g}" if self.outliers else ""
        return f"{name}-b{self.block}-z{self.zero}{'-min' * self.minima}" if self.two_level else name


def joined(formats: Sequence[Format]) -> Format | None:
    """The format that holds matrices of each of `formats` exactly; None if there is none."""
    first = formats[0]
    if len({format_.two_level for format_ in formats}) > 1:
        return None
    if not first.two_level:
        alike = len({(f.group, f.outliers) for f in formats}) == 1
        return max(formats, key=lambda f: f.bits) if alike else None
    return Format.two_level_of(
        -max(f.zero for f in formats),
        max((1 << f.bits) - 1 - f.zero for f in formats),
        min(f.group for f in formats),
        min(f.block for f in formats),
        minima=any(f.minima for f in formats),
    )
