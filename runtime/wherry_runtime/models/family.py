"""What a family's file says."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from wherry_runtime.loading.errors import ModelError

Fields = dict[str, Any]


# What `config.json` of a model without attention does not say. A state bounds no context.
RECURRENT = {
    "num_attention_heads": 1,
    "head_dim": 64,
    "intermediate_size": 1,
    "max_position_embeddings": 1 << 20,
    "hidden_act": "silu",
}


def nothing(raw: dict[str, Any]) -> Fields:
    """A plain decoder."""
    return {}


@dataclass(frozen=True, kw_only=True)
class Family:
    """An architecture: how its `config.json` reads.

    Attributes:
        architecture: as `config.json` names it.
        encoder: it turns texts into vectors.
        also: other names of it, of models with a head that is left out.
        fields: what differs from a plain decoder, from `config.json`.
        defaults: of `config.json`, where a file leaves them out.
        aliases: its own names of common settings → the common names.
        theta, partial: rotary defaults: base, and the part of a head that rotates.
        interleaved: neighbours rotate together.
        rotary: False: there is no rotary embedding, or `fields` reads it.
        quantization: the method of checkpoints that are quantized and that the family's layout reads.
    """

    architecture: str
    name: str
    fields: Callable[[dict[str, Any]], Fields] = nothing
    defaults: Mapping[str, Any] = field(default_factory=dict)
    aliases: Mapping[str, str] = field(default_factory=dict)
    theta: float = 10000.0
    partial: float = 1.0
    interleaved: bool = False
    rotary: bool = True
    quantization: str = ""
    encoder: bool = False
    also: tuple[str, ...] = ()

    def common(self, raw: dict[str, Any]) -> dict[str, Any]:
        """`raw` in the common names, with the defaults of what it does not name."""
        own = {self.aliases[key]: value for key, value in raw.items() if key in self.aliases and value is not None}
        return {**self.defaults, **raw, **own}

    def without_own_quantization(self, raw: dict[str, Any]) -> dict[str, Any]:
        """`raw`, where the layout reads the quantized tensors, as if they were floats."""
        given = raw.get("quantization_config")
        if self.quantization and isinstance(given, dict) and given.get("quant_method") == self.quantization:
            return {key: value for key, value in raw.items() if key != "quantization_config"}
        return raw


def refuse(unsupported: bool, what: str) -> None:
    """Refuses a setting that no model is known to have.

    Raises:
        ModelError: unsupported_setting.
    """
    if unsupported:
        raise ModelError("unsupported_setting", f"{what} is not supported")


def flag(raw: dict[str, Any], name: str, *, default: bool = False) -> bool:
    """A switch of `config.json`."""
    value = raw.get(name)
    return default if value is None else bool(value)
