"""How a model holds its weights: which format each matrix has, and where its memory comes from."""

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from wherry_runtime.quantization.formats import GROUPS, Format, joined
from wherry_runtime.quantization.huge_pages import Arena
from wherry_runtime.quantization.mapped import Mapped

if TYPE_CHECKING:  # a name of strings; the settings around it are nothing that weights are made of
    from wherry_protocol.engine_config import Quantization

log = logging.getLogger(__name__)

Role = Literal["qkv", "output", "gate_up", "down", "head"]
# What int4 leaves finer, because rounding it costs as much as rounding all the rest: the head, and the first layer's
# attention. Measured in docs/performance/weights.md.
FINER = Format("int8", 128)
FINER_IN_FIRST_LAYER: tuple[Role, ...] = ("qkv", "output")
DEFAULT_GROUPS: "dict[Quantization, int]" = {"none": 0, "int8": 128, "int4": 32}


@dataclass(frozen=True)
class Storage:
    """What every layer is made with.

    Attributes:
        dtype: of the embedding, and of matrices that are not quantized.
        group: weights that share a scale; 0: the method's own.
        native: matrices are packed for the native kernels, vectors are float32.
        held: matrices that the checkpoint has in a packed format already, by name: they keep it.
        product: makes the products of packed layers, where PyTorch computes what is around them.
        mapped: lets native matrices of the checkpoint's own type stay in its mapped files until they are settled.
        matrix_dtype: of matrices that are not packed and of the embedding, where it is not `dtype`, which products are
            computed in.
    """

    dtype: torch.dtype
    device: torch.device
    quantization: "Quantization" = "none"
    group: int = 0
    native: bool = False
    matrix_dtype: torch.dtype | None = None
    held: Mapping[str, Format] = field(default_factory=dict)
    product: Callable[[Any], Callable[[torch.Tensor], torch.Tensor]] | None = field(default=None, compare=False)
    mapped: Mapped | None = field(default=None, repr=False, compare=False)
    _arena: Arena = field(default_factory=Arena, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.group not in (0, *GROUPS) or (self.group and self.quantization == "none"):
            sizes = ", ".join(map(str, GROUPS))
            raise ValueError(
                f"group size {self.group} with quantization {self.quantization}: int8 and int4 take {sizes}"
            )

    @property
    def vector_dtype(self) -> torch.dtype:
        """Of norm weights and biases."""
        return torch.float32 if self.native else self.dtype

    def format(self, role: Role, *, first_layer: bool = False) -> Format | None:
        """The packed format of the matrices of one kind; None: a plain tensor of `dtype`."""
        if self.quantization == "none":
            if not self.native:
                return None
            return Format("bfloat16" if self.dtype is torch.bfloat16 else "float32")
        if self.quantization == "int4" and (role == "head" or (first_layer and role in FINER_IN_FIRST_LAYER)):
            return FINER
        return Format(self.quantization, self.group or DEFAULT_GROUPS[self.quantization])

    def kept(self, names: Iterable[str]) -> Format | None:
        """The format that these matrices, which are held as one, have in the checkpoint, or fit into; or None."""
        formats = [self.held.get(name) for name in names]
        known = [format_ for format_ in formats if format_ is not None]
        return joined(known) if known and len(known) == len(formats) else None

    def allocate(self, num_bytes: int) -> torch.Tensor:
        """[num_bytes] uint8 on the device, aligned to 64 bytes; on CPU zeros, in huge pages where allowed."""
        if self.device.type == "cpu":
            return self._arena.allocate(num_bytes)
        return torch.zeros(num_bytes, dtype=torch.uint8, device=self.device)

    @property
    def packs(self) -> bool:
        """Whether any matrix is held in another way than the checkpoint has it."""
        return self.native or self.quantization != "none" or bool(self.held)

    def describe(self) -> str:
        """Everything that the bytes held for a checkpoint depend on."""
        formats = [f"{role} {self.format(role, first_layer=f)}" for f in (True, False) for role in get_args(Role)]
        held = [f"{name} {format_}" for name, format_ in sorted(self.held.items())]
        return f"{self.dtype}, vectors {self.vector_dtype}, {', '.join(formats + held)}"

    def __str__(self) -> str:
        return f"{self.dtype}".removeprefix("torch.") if self.quantization == "none" else str(self.format("down"))
