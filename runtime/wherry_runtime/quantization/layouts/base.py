"""What a layout of quantized checkpoints is: which tensors stand for a matrix, and how they are read and written."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.grouped import Grouped

Parts = Mapping[str, torch.Tensor]  # suffix of a matrix's name → tensor, read when it is asked for


def not_held(parts: Parts) -> Format | None:
    """Of what no format of the engine holds exactly."""
    return None


@dataclass(frozen=True, slots=True)
class Kind:
    """One way in which a matrix lies in a checkpoint.

    Attributes:
        suffixes: of the tensors that it is made of, after the matrix's name and a dot; the first one tells it.
        read: the matrix [N, K], as whole numbers with scales where it is that, else as floats.
        format: the engine's format that holds it exactly, from the small tensors alone; None: it is read as floats.
        optional: suffixes that may be there as well.
        unused: of tensors that nothing here needs, such as the scales of rounded activations.
        ternary: all weights are -1, 0 or 1 times a scale.
    """

    suffixes: tuple[str, ...]
    read: Callable[[Parts], Grouped | torch.Tensor]
    format: Callable[[Parts], Format | None] = not_held
    optional: tuple[str, ...] = ()
    unused: tuple[str, ...] = ()
    ternary: bool = False


@dataclass(frozen=True, slots=True)
class Layout:
    """A published way of writing quantized checkpoints.

    Attributes:
        method: `quant_method` in config.json.
        kinds: from the settings in config.json.
    """

    method: str
    kinds: Callable[[dict[str, Any]], tuple[Kind, ...]]


class UnsupportedLayoutError(ValueError):
    """Settings that are not known; the message says which are."""


def setting(config: dict[str, Any], name: str, known: tuple[Any, ...], default: Any = None) -> Any:
    """`config[name]`, which is one of `known`.

    Raises:
        UnsupportedLayoutError: it is not.
    """
    value = config.get(name, default)
    if value not in known:
        raise UnsupportedLayoutError(f"{name} {value!r} is not supported; {', '.join(map(str, known))} are")
    return value


@dataclass(frozen=True, slots=True)
class Writer:
    """How rounded matrices are written. `tensors` takes what a recipe made of one: suffix → tensor.

    `mixed` tells `quantization_config` of each matrix's settings, in layouts where they may differ. Both are told which
    matrices stay as they are, by name.
    """

    tensors: Callable[[Any], dict[str, torch.Tensor]]
    config: Callable[[Any, Sequence[str]], dict[str, Any]]  # a recipe's settings → `quantization_config`
    mixed: Callable[[Mapping[str, Any], Sequence[str]], dict[str, Any]] | None = None
