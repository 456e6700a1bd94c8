"""The architectures of GGUF files, and what a checkpoint calls their tensors. Names and meanings: llama.cpp's
gguf-py/gguf/constants.py and src/llama-model.cpp. What they are configured with is in `config`."""

import difflib
import re
from typing import Any, NamedTuple

import numpy as np

from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.reader import TensorInfo
from wherry_runtime.loading.errors import ModelError

Metadata = dict[str, Value]
Config = dict[str, Any]


class Experts(NamedTuple):
    """What a checkpoint calls the experts of a layer.

    Attributes:
        module: that the router and they are in.
        gate, up, down: of an expert.
        inner: field of config.json with an expert's width; None: the MLP's.
        normalized: whether llama.cpp makes the chosen experts' weights sum to one.
        shared: whether there is one for every token.
    """

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    inner: str | None = "moe_intermediate_size"
    normalized: bool = True
    shared: bool = False


class Architecture(NamedTuple):
    """An architecture of GGUF.

    Attributes:
        name: `general.architecture`
        models: what config.json calls it, the usual one first.
        model_type: of config.json.
        neighbours: rotary dimensions i and i + n/2 of a head of queries and keys lie side by side in GGUF.
        names: of a layer's modules, in GGUF and in a checkpoint, where they are not as in most.
        activation: `hidden_act`
        offset: added to the weights of norms in GGUF.
        period: of every so many layers all but the last have the window; 0: all of them have it.
        head_dim: where config.json does not say; 0: the share of a head.
        numbers: keys of GGUF → fields of config.json that say the same, and what these are when they are not there.
        eps: key of GGUF and field of config.json with what is added to norms' variance.
        partial: the part of each head that rotates where config.json does not say; 0: all of it, always.
        outside: modules beside the layers, where they are not as in most.
        tied: the head is always the embedding.
        experts: None: it never has any.
    """

    name: str
    models: tuple[str, ...]
    model_type: str
    neighbours: bool = False
    names: dict[str, str] = {}  # noqa: RUF012 - a NamedTuple's default
    activation: str = "silu"
    offset: float = 0.0
    period: int = 0
    head_dim: int = 0
    numbers: dict[str, tuple[str, float | None]] = {}  # noqa: RUF012
    eps: tuple[str, str] = ("layer_norm_rms_epsilon", "rms_norm_eps")
    partial: float = 0.0
    outside: dict[str, str] = {}  # noqa: RUF012
    tied: bool = False
    experts: Experts | None = None


_AROUND = {
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_GELU = "gelu_pytorch_tanh"
_CAPS: dict[str, tuple[str, float | None]] = {
    "attn_logit_softcapping": ("attn_logit_softcapping", None),
    "final_logit_softcapping": ("final_logit_softcapping", None),
}
_FACTORS: dict[str, tuple[str, float | None]] = {
    "attention.scale": ("attention_multiplier", 1.0),
    "embedding_scale": ("embedding_multiplier", 1.0),
    "residual_scale": ("residual_multiplier", 1.0),
    "logit_scale": ("logits_scaling", 1.0),
}
_LAYER_NORM = ("layer_norm_epsilon", "layer_norm_eps")
ARCHITECTURES = {
    a.name: a
    for a in (
        Architecture("llama", ("LlamaForCausalLM", "MistralForCausalLM"), "llama", neighbours=True),
        Architecture("qwen2", ("Qwen2ForCausalLM",), "qwen2"),
        Architecture("qwen3", ("Qwen3ForCausalLM",), "qwen3", head_dim=128),
        Architecture("gemma", ("GemmaForCausalLM",), "gemma", activation=_GELU, offset=1.0, head_dim=256, tied=True),
        Architecture(
            *("gemma2", ("Gemma2ForCausalLM",), "gemma2"),
            names=_AROUND, activation=_GELU, offset=1.0, period=2, head_dim=256, numbers=_CAPS, tied=True,
        ),
        Architecture(
            *("gemma3", ("Gemma3ForCausalLM",), "gemma3_text"),
            names=_AROUND, activation=_GELU, offset=1.0, period=6, head_dim=256,
        ),
        Architecture(
            *("phi3", ("Phi3ForCausalLM",), "phi3"),
            names={"attn_qkv": "self_attn.qkv_proj", "ffn_up": "mlp.gate_up_proj"}, partial=1.0,
        ),
        Architecture(
            *("qwen2moe", ("Qwen2MoeForCausalLM",), "qwen2_moe"), experts=Experts(normalized=False, shared=True)
        ),
        Architecture("qwen3moe", ("Qwen3MoeForCausalLM",), "qwen3_moe", experts=Experts()),
        Architecture("granite", ("GraniteForCausalLM",), "granite", neighbours=True, numbers=_FACTORS),
        Architecture(
            *("command-r", ("CohereForCausalLM",), "cohere"),
            numbers={"logit_scale": ("logit_scale", 0.0625)}, eps=_LAYER_NORM, tied=True,
        ),
        Architecture("stablelm", ("StableLmForCausalLM",), "stablelm", eps=_LAYER_NORM, partial=0.25),
        Architecture(
            *("phi2", ("PhiForCausalLM",), "phi"),
            names={"attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"},
            activation="gelu_new", eps=_LAYER_NORM, partial=0.5, outside={"output_norm": "model.final_layernorm"},
        ),
        Architecture(
            *("olmo", ("OlmoForCausalLM",), "olmo"),
            neighbours=True, numbers={"attention.clamp_kqv": ("clip_qkv", None)}, eps=_LAYER_NORM,
        ),
        Architecture(
            *("olmo2", ("Olmo2ForCausalLM",), "olmo2"),
            names={"post_attention_norm": "post_attention_layernorm", "post_ffw_norm": "post_feedforward_layernorm"},
        ),
    )
}  # fmt: skip
# Of Llama's architecture in GGUF, too.
MIXTRAL = Architecture(
    *("llama", ("MixtralForCausalLM",), "mixtral"),
    neighbours=True,
    experts=Experts("block_sparse_moe", "w1", "w3", "w2", inner=None),
)
_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_INSIDE = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_LAYER = re.compile(r"blk\.(\d+)\.(\w+)\.(weight|bias)")
_LAYER_BACK = re.compile(r"model\.layers\.(\d+)\.([\w.]+)\.(weight|bias)")
_EXPERT = re.compile(r"(\w+)\.experts\.(\d+)\.(\w+)")
# What frequencies are divided by, each [rotated / 2] float32: Llama 3's, and of long and short contexts.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


def architecture_of(metadata: Metadata) -> Architecture:
    """The one that a file is of.

    Raises:
        ModelError: unknown_architecture, with the known ones and the nearest.
    """
    name = str(metadata.get("general.architecture"))
    if name == "llama" and metadata.get("llama.expert_count"):
        return MIXTRAL
    return _known(name, ARCHITECTURES, "GGUF")


def architecture_for(config: Config) -> Architecture:
    """The one that a checkpoint with this config.json becomes.

    Raises:
        ModelError: unknown_architecture.
    """
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else "none"
    return _known(name, {model: a for a in (*ARCHITECTURES.values(), MIXTRAL) for model in a.models}, "config.json")


def _known(name: str, known: dict[str, Architecture], where: str) -> Architecture:
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ModelError(
        "unknown_architecture", f"{where} architecture {name!r} is not converted. Known: {', '.join(known)}{hint}"
    )


def _modules(architecture: Architecture) -> dict[str, str]:
    """A layer's modules: name in GGUF → in a checkpoint."""
    found = {**_INSIDE, **architecture.names}
    if (experts := architecture.experts) is not None:
        found["ffn_gate_inp"] = f"{experts.module}.gate"
        if experts.shared:
            found |= {f"ffn_{part}_shexp": f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")}
            found["ffn_gate_inp_shexp"] = "mlp.shared_expert_gate"
    return found


def _stacked(architecture: Architecture) -> dict[str, str]:
    """Tensors of all experts of a layer in GGUF → what a checkpoint calls that matrix of an expert."""
    experts = architecture.experts
    if experts is None:
        return {}
    return {"ffn_gate_exps": experts.gate, "ffn_up_exps": experts.up, "ffn_down_exps": experts.down}


def checkpoint_tensors(architecture: Architecture, info: TensorInfo) -> dict[str, TensorInfo]:
    """`blk.3.ffn_up.weight` → `model.layers.3.mlp.up_proj.weight`; all experts' matrices, one by one; nothing for what
    is part of the configuration.

    Raises:
        ModelError: unexpected_tensors.
    """
    if info.name in FACTORS:
        return {}
    stem, _, kind = info.name.rpartition(".")
    if (outside := {**_OUTSIDE, **architecture.outside}.get(stem)) is not None:
        return {f"{outside}.{kind}": info}
    if match := _LAYER.fullmatch(info.name):
        layer, module = f"model.layers.{match[1]}", match[2]
        if module == "ffn_gate_inp_shexp" and len(info.shape) == 1:
            info = info._replace(shape=(1, *info.shape))  # a gate's only row
        if architecture.experts is not None and module in _stacked(architecture) and len(info.shape) == 3:
            names = f"{layer}.{architecture.experts.module}.experts.{{}}.{_stacked(architecture)[module]}.{kind}"
            return {names.format(i): part for i, part in enumerate(_parts(info))}
        if (name := _modules(architecture).get(module)) is not None:
            return {f"{layer}.{name}.{kind}": info}
    raise ModelError("unexpected_tensors", f"tensor {info.name} has no place in the architectures that are known")


def _parts(info: TensorInfo) -> list[TensorInfo]:
    """What `info` is a stack of."""
    size = info.nbytes // info.shape[0]
    return [
        info._replace(shape=info.shape[1:], offset=info.offset + i * size, nbytes=size) for i in range(info.shape[0])
    ]


def gguf_name(architecture: Architecture, name: str) -> tuple[str, int | None]:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`, and which of the stack there, if it is one.

    Raises:
        ModelError: unexpected_tensors.
    """
    stem, _, kind = name.rpartition(".")
    outside = {theirs: ours for ours, theirs in {**_OUTSIDE, **architecture.outside}.items()}
    if stem in outside:
        return f"{outside[stem]}.{kind}", None
    if match := _LAYER_BACK.fullmatch(name):
        back = {theirs: ours for ours, theirs in _modules(architecture).items()}
        if match[2] in back:
            return f"blk.{match[1]}.{back[match[2]]}.{kind}", None
        experts, parts = architecture.experts, {theirs: ours for ours, theirs in _stacked(architecture).items()}
        expert = _EXPERT.fullmatch(match[2])
        if experts is not None and expert is not None and expert[1] == experts.module and expert[3] in parts:
            return f"blk.{match[1]}.{parts[expert[3]]}.{kind}", int(expert[2])
    raise ModelError("unexpected_tensors", f"tensor {name} has no name in GGUF files of {architecture.name}")


def norm_offset(architecture: Architecture, name: str) -> float:
    """What GGUF has added to a tensor (by its GGUF name)."""
    return architecture.offset if name.endswith("norm.weight") else 0.0


def rotated_heads(architecture: Architecture, name: str, config: Config) -> int:
    """The heads of a tensor (by its GGUF name) whose rows lie otherwise than in a checkpoint; 0: they do not."""
    match = _LAYER.fullmatch(name)
    if not architecture.neighbours or match is None or match[2] not in ("attn_q", "attn_k"):
        return 0
    return int(config["num_attention_heads" if match[2] == "attn_q" else "num_key_value_heads"])


def rows_from_neighbours(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each row of a checkpoint's q or k the row of GGUF's that it is: [rows]."""
    return np.arange(rows).reshape(heads, rows // heads // 2, 2).swapaxes(1, 2).reshape(-1)


def rows_to_neighbours(rows: int, heads: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """For each row of GGUF's q or k the row of a checkpoint's that it is: [rows]."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)
