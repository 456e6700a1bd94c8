"""ggml's tensor types: how many elements share a block and how many bytes it takes."""

from typing import NamedTuple

from wherry_runtime.loading.errors import ModelError


class GGMLType(NamedTuple):
    """A tensor type.

    Attributes:
        id: as files have it.
        block: elements that are stored together, in a row of the tensor.
        size: bytes of a block.
    """

    id: int
    name: str
    block: int
    size: int

    @property
    def bits(self) -> float:
        """Bits per weight, scales included."""
        return 8 * self.size / self.block


_TABLE = (
    GGMLType(0, "F32", 1, 4),
    GGMLType(1, "F16", 1, 2),
    GGMLType(2, "Q4_0", 32, 18),
    GGMLType(3, "Q4_1", 32, 20),
    GGMLType(6, "Q5_0", 32, 22),
    GGMLType(7, "Q5_1", 32, 24),
    GGMLType(8, "Q8_0", 32, 34),
    GGMLType(10, "Q2_K", 256, 84),
    GGMLType(11, "Q3_K", 256, 110),
    GGMLType(12, "Q4_K", 256, 144),
    GGMLType(13, "Q5_K", 256, 176),
    GGMLType(14, "Q6_K", 256, 210),
    GGMLType(15, "Q8_K", 256, 292),
    GGMLType(16, "IQ2_XXS", 256, 66),
    GGMLType(17, "IQ2_XS", 256, 74),
    GGMLType(18, "IQ3_XXS", 256, 98),
    GGMLType(19, "IQ1_S", 256, 50),
    GGMLType(20, "IQ4_NL", 32, 18),
    GGMLType(21, "IQ3_S", 256, 110),
    GGMLType(22, "IQ2_S", 256, 82),
    GGMLType(23, "IQ4_XS", 256, 136),
    GGMLType(24, "I8", 1, 1),
    GGMLType(25, "I16", 1, 2),
    GGMLType(26, "I32", 1, 4),
    GGMLType(27, "I64", 1, 8),
    GGMLType(28, "F64", 1, 8),
    GGMLType(29, "IQ1_M", 256, 56),
    GGMLType(30, "BF16", 1, 2),
    GGMLType(34, "TQ1_0", 256, 54),
    GGMLType(35, "TQ2_0", 256, 66),
    GGMLType(39, "MXFP4", 32, 17),
    GGMLType(40, "NVFP4", 64, 36),
    GGMLType(41, "Q1_0", 128, 18),
    GGMLType(42, "Q2_0", 64, 18),
)
TYPES = {t.id: t for t in _TABLE}
# What checkpoints have and GGUF has not: bytes that mean something to their own layout alone.
BYTES = GGMLType(-1, "U8", 1, 1)
BY_NAME = {t.name: t for t in _TABLE}
# Ids that the format once had, or that only llama.cpp's memory has.
GONE = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1 (activations, never in a file)", 31: "Q4_0_4_4", 32: "Q4_0_4_8", 33: "Q4_0_8_8",
    36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
}  # fmt: skip
# What llama.cpp calls a whole file whose matrices are mostly of a type (`general.file_type`).
FILE_TYPES = {
    "F32": 0, "F16": 1, "BF16": 32, "Q4_0": 2, "Q8_0": 7, "Q5_0": 8, "Q4_K": 14, "Q5_K": 16, "Q6_K": 18,
}  # fmt: skip


def type_of(number: int) -> GGMLType:
    """The type that a file calls `number`.

    Raises:
        ModelError: bad_gguf, saying whether the format has dropped it.
    """
    if (known := TYPES.get(number)) is not None:
        return known
    if number in GONE:
        raise ModelError("bad_gguf", f"tensor type {number} ({GONE[number]}) is no longer read; convert the model anew")
    raise ModelError("bad_gguf", f"tensor type {number} is not known")


def type_named(name: str) -> GGMLType:
    """The type called `name`, in any case.

    Raises:
        ModelError: unknown_type, with those that there are.
    """
    if (known := BY_NAME.get(name.upper())) is not None:
        return known
    raise ModelError("unknown_type", f"{name!r} is no GGUF tensor type; there are {', '.join(BY_NAME)}")
