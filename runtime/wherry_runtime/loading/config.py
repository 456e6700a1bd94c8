"""`config.json` of a checkpoint as our own type."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quantization.layouts import kinds_of
from wherry_runtime.quantization.layouts.base import UnsupportedLayoutError

Positive = Annotated[int, msgspec.Meta(ge=1)]
PositiveFloat = Annotated[float, msgspec.Meta(gt=0)]


class RopeConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Rotary position embedding: `default`, `linear` (positions divided by `factor`) or `llama3`."""

    rope_type: Literal["default", "linear", "llama3"] = "default"
    rope_theta: PositiveFloat = 10000.0
    factor: PositiveFloat = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a decoder. The families' files fill in what differs between them."""

    family: str
    architecture: str
    dtype: Literal["float32", "bfloat16", "float16"]
    vocab_size: Positive
    hidden_size: Positive
    intermediate_size: Positive
    num_layers: Positive
    num_heads: Positive
    num_kv_heads: Positive
    head_dim: Positive
    max_position_embeddings: Positive
    rms_norm_eps: PositiveFloat
    rope: RopeConfig
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[Positive | None, ...] = ()  # per layer: how many tokens back it attends, itself included; None: all
    eos_token_ids: tuple[int, ...] = ()
    bos_token_id: int | None = None


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of the checkpoint.

    Raises:
        ModelError: missing_file or bad_json.
    """
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError("missing_file", f"{path}: not found; is {path.parent} a model directory?") from None
    except OSError as e:
        raise ModelError("unreadable_file", f"{path}: {e.strerror}") from e
    except (ValueError, RecursionError) as e:
        raise ModelError("bad_json", f"{path}: not readable as JSON: {e}") from e
    if not isinstance(content, dict):
        raise ModelError("bad_json", f"{path}: a JSON object is expected, found {type(content).__name__}")
    return content


def architecture_of(raw: dict[str, Any], known: list[str], path: Path) -> str:
    """The one of `known` that the checkpoint names.

    Raises:
        ModelError: unknown_architecture, naming the known ones and the nearest.
    """
    listed = raw.get("architectures")
    named: list[str] = [n for n in listed if isinstance(n, str)] if isinstance(listed, list) else []
    for name in named:
        if name in known:
            return name
    found = ", ".join(named) or "none"
    near = difflib.get_close_matches(named[0], known, n=1) if named else []
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ModelError(
        "unknown_architecture", f"{path}: architecture {found} is not known. Known: {', '.join(known)}{hint}"
    )


def rope_config(raw: dict[str, Any], path: Path) -> RopeConfig:
    """The rotary settings, as transformers 5 (`rope_parameters`) or 4 (`rope_theta`, `rope_scaling`) spells them."""
    scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
    if not isinstance(scaling, dict):
        raise ModelError("bad_config", f"{path}: rope: an object is expected, found {type(scaling).__name__}")
    scaling = dict(scaling)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind not in ("default", "linear", "llama3"):
        raise ModelError(
            "unsupported_rope", f"{path}: rope type {kind!r} is not supported; default, linear, llama3 are"
        )
    scaling["rope_type"] = kind
    scaling.setdefault("rope_theta", raw.get("rope_theta", 10000.0))
    if scaling.get("original_max_position_embeddings") is None:
        scaling["original_max_position_embeddings"] = raw.get("max_position_embeddings", 8192)
    fields = {f.name for f in msgspec.structs.fields(RopeConfig)}
    try:
        return msgspec.convert({k: v for k, v in scaling.items() if k in fields and v is not None}, RopeConfig)
    except msgspec.ValidationError as e:
        raise ModelError("bad_config", f"{path}: rope: {e}") from e


def common_fields(raw: dict[str, Any], path: Path) -> dict[str, Any]:
    """What every family's `config.json` says in the same words."""
    if (quantization := raw.get("quantization_config")) is not None:
        try:
            kinds_of(quantization)
        except UnsupportedLayoutError as e:
            raise ModelError("unsupported_quantization", f"{path}: quantization_config: {e}") from e
    if (activation := raw.get("hidden_act", "silu")) != "silu":
        raise ModelError("unsupported_activation", f"{path}: hidden_act {activation!r} is not supported; silu is")
    heads = raw.get("num_attention_heads")
    head_dim = raw.get("head_dim")
    if head_dim is None and isinstance(heads, int) and heads > 0 and isinstance(raw.get("hidden_size"), int):
        head_dim = raw["hidden_size"] // heads
    return {
        "dtype": raw.get("dtype") or raw.get("torch_dtype") or "float32",
        "vocab_size": raw.get("vocab_size"),
        "hidden_size": raw.get("hidden_size"),
        "intermediate_size": raw.get("intermediate_size"),
        "num_layers": raw.get("num_hidden_layers"),
        "num_heads": heads,
        "num_kv_heads": raw.get("num_key_value_heads") or heads,
        "head_dim": head_dim,
        "max_position_embeddings": raw.get("max_position_embeddings", 2048),
        "rms_norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope": rope_config(raw, path),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "eos_token_ids": token_ids(raw.get("eos_token_id")),
        "bos_token_id": raw.get("bos_token_id") if isinstance(raw.get("bos_token_id"), int) else None,
    }


def count(raw: dict[str, Any], name: str, default: int = 0) -> int:
    """A field that counts something. Anything but a sane number is `default`; `build_config` refuses what matters."""
    value = raw.get(name, default)
    return value if isinstance(value, int) and 0 <= value <= 10_000 else default


def token_ids(value: object) -> tuple[int, ...]:
    """`eos_token_id` may be missing, one id or a list."""
    return tuple(v for v in (value if isinstance(value, list) else [value]) if isinstance(v, int))


def build_config(fields: dict[str, Any], path: Path) -> ModelConfig:
    """Checks types and ranges.

    Raises:
        ModelError: bad_config, naming the field.
    """
    try:
        config = msgspec.convert(fields, ModelConfig)
    except msgspec.ValidationError as e:
        raise ModelError("bad_config", f"{path}: {e}") from e
    if config.num_heads % config.num_kv_heads:
        raise ModelError("bad_config", f"{path}: {config.num_heads} heads do not divide by {config.num_kv_heads}")
    if len(config.windows) not in (0, config.num_layers):
        raise ModelError("bad_config", f"{path}: layer_types has {len(config.windows)} of {config.num_layers} layers")
    if config.head_dim % 2:
        raise ModelError("bad_config", f"{path}: head_dim {config.head_dim} must be even")
    return config
