"""Names and numbers of the weight formats."""

from dataclasses import dataclass
from typing import Literal

Method = Literal["float32", "bfloat16", "int8", "int4", "ternary"]

PANEL = 64  # output columns that lie together
INPUT_MULTIPLE = 128  # rows of a panel are padded to this, so that whole groups fit whatever their size
GROUPS = (32, 64, 128)


def padded_inputs(width: int) -> int:
    """Columns that `width` values take as the input of a product."""
    return -(-width // INPUT_MULTIPLE) * INPUT_MULTIPLE


_KINDS: dict[Method, int] = {
    "float32": 0,
    "bfloat16": 1,
    "int8": 2,
    "int4": 3,
}  # no kernel computes with ternary weights
_BITS: dict[Method, int] = {"float32": 32, "bfloat16": 16, "int8": 8, "int4": 4, "ternary": 2}


@dataclass(frozen=True, slots=True)
class Format:
    """How a matrix is held. `group` weights along the input share a scale; 0: the method has no scales."""

    method: Method
    group: int = 0

    def __post_init__(self) -> None:
        if self.group not in (GROUPS if self.quantized else (0,)):
            raise ValueError(f"{self.method} weights have no groups of {self.group}")

    @property
    def quantized(self) -> bool:
        return self.method in ("int8", "int4", "ternary")

    @property
    def kind(self) -> int:
        """The format's number in the native library."""
        return _KINDS[self.method]

    @property
    def bits(self) -> int:
        """Of a weight, without scales; of ternary ones, which take 1.625, as whole ones."""
        return _BITS[self.method]

    @property
    def bits_per_weight(self) -> float:
        """With scales."""
        return self.bits + (16 / self.group if self.group else 0)

    def __str__(self) -> str:
        return f"{self.method}-g{self.group}" if self.group else self.method
