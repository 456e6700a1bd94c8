"""`config.json` of a checkpoint as our own type."""

import difflib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec

from wherry_runtime.loading.encoder_config import EncoderConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.recurrent_config import RecurrentConfig
from wherry_runtime.loading.rope_config import PositiveFloat, RopeConfig

Positive = Annotated[int, msgspec.Meta(ge=1)]


NormKind = Literal["rms", "layer"]
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "clamped_silu"]
# What transformers calls them.
ACTIVATIONS: dict[str, ActivationKind] = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
}


class NormConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What the norms between layers are like.

    Attributes:
        kind: root mean square (https://arxiv.org/abs/1910.07467) or layer norm (https://arxiv.org/abs/1607.06450).
        weight, bias: whether they have them.
        offset: what is added to the checkpoint's weights.
        placement: before attention and MLP, after both, or both before and after.
    """

    kind: NormKind = "rms"
    weight: bool = True
    bias: bool = False
    offset: float = 0.0
    placement: Literal["before", "after", "around"] = "before"


class ExpertsConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A mixture of experts in place of the MLP.

    Attributes:
        layers: which layers have one; others have an MLP.
        intermediate_size: of one expert.
        softmax: over all experts before some are chosen, or over the chosen ones.
        normalized: whether the chosen ones' weights are made to sum to one.
        bias: whether router and experts have biases.
        shared_intermediate_size: of an expert that sees every token, behind a gate of its own; 0: there is none.
        fused: a tensor of the checkpoint holds all experts' matrices ([experts, inputs, outputs], gate and up columns
            alternating), as GPT-OSS has them; or there is one for each.
        packed: the fused ones are in MXFP4.
    """

    layers: tuple[bool, ...]
    num_experts: Positive
    experts_per_token: Positive
    intermediate_size: Positive
    softmax: Literal["all", "chosen"] = "all"
    normalized: bool = True
    bias: bool = False
    shared_intermediate_size: Annotated[int, msgspec.Meta(ge=0)] = 0
    fused: bool = False
    packed: bool = False


class Layout(msgspec.Struct, frozen=True, kw_only=True):
    """How a checkpoint's tensors are named and cut, where that is not as in Llama's.

    Attributes:
        names: our name of a module (Llama's) → the checkpoint's; `{}` is a number, of an expert or a head. Those in
            layers are relative to the layer.
        fused: a checkpoint's module of layers → our modules that it holds, the outputs of one after those of another.
        grouped: of a fused tensor of queries, keys and values: each key head's queries come before it and its values.
        transposed: matrices of layers are [inputs, outputs].
        prefix: what every name begins with, but that some checkpoints leave out.
    """

    names: dict[str, str] = {}
    fused: dict[str, tuple[str, ...]] = {}
    grouped: bool = False
    transposed: bool = False
    prefix: str = ""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """The shape of a model. The families' files fill in what differs between them.

    Attributes:
        rope: None: positions are told in another way, or not at all.
        local_rope: of layers with a window, where it is another one.
        alibi: factor of the slopes of linear biases (https://arxiv.org/abs/2108.12409); 0: there are none.
        learned_positions: a row for each position is added to the embedding; this many rows of the table come before
            the first one's. None: no table.
        activation, gated: act(gate) · up, or act(up).
        parallel: attention and MLP both see what the layer sees, with `shared_norm` through the same norm.
        qk_norm: of queries and keys: each head with the same weights (`head`), with weights of its own (`heads`), all
            together (`whole`), or none.
        sub_norms: before the output and down projections.
        attention_scale: of scores; None: 1 / sqrt(head_dim).
        attention_softcap, logit_softcap: c · tanh(x / c) of scores and of logits.
        sinks: each head attends to nothing by a learned weight (https://arxiv.org/abs/2309.17453).
        clip_qkv: queries, keys and values are cut off at this magnitude.
        recurrent: there is no attention: layers keep a state, and what is said of heads means nothing.
        encoder: texts become vectors, and nothing is generated.
        embedding_scale, residual_scale, logit_scale: factors of the embedding, of what a block adds, and of logits.
    """

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
    norm_eps: PositiveFloat
    rope: RopeConfig | None
    tie_word_embeddings: bool
    local_rope: RopeConfig | None = None
    alibi: Annotated[float, msgspec.Meta(ge=0)] = 0.0
    learned_positions: Annotated[int, msgspec.Meta(ge=0)] | None = None
    norm: NormConfig = NormConfig()
    embedding_norm: bool = False
    final_norm: bool = True
    sub_norms: bool = False
    parallel: bool = False
    shared_norm: bool = False
    activation: ActivationKind = "silu"
    gated: bool = True
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: Literal["head", "heads", "whole"] | None = None
    windows: tuple[Positive | None, ...] = ()  # per layer: how many tokens back it attends, itself included; None: all
    attention_scale: PositiveFloat | None = None
    attention_softcap: PositiveFloat | None = None
    logit_softcap: PositiveFloat | None = None
    sinks: bool = False
    clip_qkv: PositiveFloat | None = None
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0
    experts: ExpertsConfig | None = None
    recurrent: RecurrentConfig | None = None
    encoder: EncoderConfig | None = None
    layout: Layout = Layout()
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


def common_fields(raw: dict[str, Any]) -> dict[str, Any]:
    """What every family's `config.json` says in the same words."""
    if (quantization := raw.get("quantization_config")) is not None:
        # Imported late: layouts need torch, and whoever only looks at a model does not.
        from wherry_runtime.quantization.layouts import kinds_of
        from wherry_runtime.quantization.layouts.base import UnsupportedLayoutError

        try:
            kinds_of(quantization)
        except UnsupportedLayoutError as e:
            raise ModelError("unsupported_quantization", f"quantization_config: {e}") from e
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
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "activation": activation(raw),
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "eos_token_ids": token_ids(raw.get("eos_token_id")),
        "bos_token_id": raw.get("bos_token_id") if isinstance(raw.get("bos_token_id"), int) else None,
    }


def activation(raw: dict[str, Any]) -> ActivationKind:
    """Of the MLP.

    Raises:
        ModelError: unsupported_activation, naming those that are not.
    """
    named = raw.get("hidden_act", "silu")
    if not isinstance(named, str) or named not in ACTIVATIONS:
        known = ", ".join(ACTIVATIONS)
        raise ModelError("unsupported_activation", f"hidden_act {named!r} is not supported; {known} are")
    return ACTIVATIONS[named]


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
        # What families' files built is checked too.
        config = msgspec.convert(msgspec.to_builtins(fields), ModelConfig)
    except (msgspec.ValidationError, TypeError) as e:
        raise ModelError("bad_config", f"{path}: {e}") from e
    if config.num_heads % config.num_kv_heads:
        raise ModelError("bad_config", f"{path}: {config.num_heads} heads do not divide by {config.num_kv_heads}")
    if len(config.windows) not in (0, config.num_layers):
        raise ModelError("bad_config", f"{path}: layer_types has {len(config.windows)} of {config.num_layers} layers")
    if config.head_dim % 2:
        raise ModelError("bad_config", f"{path}: head_dim {config.head_dim} must be even")
    for rope in filter(None, (config.rope, config.local_rope)):
        rotary = rope.rotary_dim(config.head_dim)
        if rotary < 2 or rotary % 2:
            raise ModelError("bad_config", f"{path}: rope: {rotary} of {config.head_dim} columns cannot be rotated")
        if rope.rope_type == "longrope" and len(rope.short_factor) != rotary // 2:
            raise ModelError(
                "bad_config", f"{path}: rope: {len(rope.short_factor)} factors where {rotary // 2} are needed"
            )
    experts = config.experts
    if experts is not None and len(experts.layers) != config.num_layers:
        raise ModelError("bad_config", f"{path}: experts in {len(experts.layers)} of {config.num_layers} layers")
    if experts is not None and experts.experts_per_token > experts.num_experts:
        raise ModelError(
            "bad_config", f"{path}: {experts.experts_per_token} of {experts.num_experts} experts cannot be chosen"
        )
    if config.tie_word_embeddings and config.head_bias:
        raise ModelError("bad_config", f"{path}: a head tied to the embedding has no bias; set tie_word_embeddings")
    return config
