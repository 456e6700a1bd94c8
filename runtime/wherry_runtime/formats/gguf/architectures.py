"""The architectures of GGUF files. Names and meanings: llama.cpp's gguf-py/gguf/constants.py and src/models. What a
checkpoint calls their tensors is in `names`, what they are configured with in `config` and `particular`."""

import difflib
from collections.abc import Callable, Container, Mapping
from typing import NamedTuple

from wherry_runtime.formats.gguf import particular
from wherry_runtime.formats.gguf.changes import (
    COLUMN,
    CONVOLUTION,
    DECAY,
    DECAY_COLUMN,
    Change,
    Turned,
    in_groups,
    ungrouped,
)
from wherry_runtime.formats.gguf.fields import Config, Fields, Metadata
from wherry_runtime.formats.gguf.particular import Particular
from wherry_runtime.loading.errors import ModelError


class Experts(NamedTuple):
    """What a checkpoint calls the experts of a layer.

    Attributes:
        module: that the router and they are in.
        gate, up, down: of an expert.
        inner: field of config.json with an expert's width; None: the MLP's.
        normalized: whether llama.cpp makes the chosen experts' weights sum to one.
        shared: whether there is one for every token.
        router: in the module.
        fused: all of a layer are in one tensor; see `fused_experts`.
    """

    module: str = "mlp"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"
    inner: str | None = "moe_intermediate_size"
    normalized: bool = True
    shared: bool = False
    router: str = "gate"
    fused: bool = False


class Architecture(NamedTuple):
    """An architecture of GGUF.

    Attributes:
        name: `general.architecture`
        models: what config.json calls it, the usual one first.
        model_type: of config.json.
        neighbours: rotary dimensions i and i + n/2 of a head of queries and keys lie side by side in GGUF.
        names: of a layer's modules, in GGUF and in a checkpoint, where they are not as in most; all of them, where
            `layers` is not, either.
        whole: names of a layer's tensors, `weight` or `bias` included, that a checkpoint has none of these for.
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
        layers: what a checkpoint calls them.
        prefix: that some checkpoints have before names, or leave out.
        dropped: beginnings of names of what GGUF has no use for.
        changes: tensors (of layers by their names in them) that lie otherwise in GGUF; of which some depend on the
            configuration.
        rotary: whether there are rotary embeddings.
        attention: whether there is any.
        own: what of its configuration only it has.
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
    layers: str = "model.layers"
    prefix: str = ""
    whole: dict[str, str] = {}  # noqa: RUF012
    dropped: tuple[str, ...] = ()
    changes: Mapping[str, Change | Callable[[Config], Change]] = {}
    rotary: bool = True
    attention: bool = True
    own: Particular = Particular()


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
_FUSED = {"attn_qkv.weight": ungrouped, "attn_qkv.bias": ungrouped}
_TWO_NORMS = {"attn_norm": "ln_mlp", "attn_norm_2": "ln_attn"}
_GPT2 = {
    "attn_norm": "ln_1", "attn_qkv": "attn.c_attn", "attn_output": "attn.c_proj",
    "ffn_norm": "ln_2", "ffn_up": "mlp.c_fc", "ffn_down": "mlp.c_proj",
}  # fmt: skip
_DENSE = {"ffn_up": "mlp.dense_h_to_4h", "ffn_down": "mlp.dense_4h_to_h"}
_NEOX = {
    "attn_norm": "input_layernorm", "attn_qkv": "attention.query_key_value", "attn_output": "attention.dense",
    "ffn_norm": "post_attention_layernorm", **_DENSE,
}  # fmt: skip
_BLOOM = {
    "attn_norm": "input_layernorm", "attn_qkv": "self_attention.query_key_value",
    "attn_output": "self_attention.dense", "ffn_norm": "post_attention_layernorm", **_DENSE,
}  # fmt: skip
_BERT = {
    "attn_q": "attention.self.query", "attn_k": "attention.self.key", "attn_v": "attention.self.value",
    "attn_output": "attention.output.dense", "attn_output_norm": "attention.output.LayerNorm",
    "ffn_up": "intermediate.dense", "ffn_down": "output.dense", "layer_output_norm": "output.LayerNorm",
}  # fmt: skip
_MAMBA = {
    "attn_norm": "norm", "ssm_in": "mixer.in_proj", "ssm_conv1d": "mixer.conv1d", "ssm_out": "mixer.out_proj",
}  # fmt: skip
_BACKBONE = {"token_embd": "backbone.embeddings", "output_norm": "backbone.norm_f"}
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
        Architecture(
            *("stablelm", ("StableLmForCausalLM",), "stablelm"),
            eps=_LAYER_NORM, partial=0.25, own=particular.STABLELM,
        ),
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
        Architecture(
            *("gpt-oss", ("GptOssForCausalLM",), "gpt_oss"),
            names={"post_attention_norm": "post_attention_layernorm"}, whole={"attn_sinks.weight": "self_attn.sinks"},
            period=2, head_dim=64, experts=Experts(inner=None, router="router", fused=True), own=particular.GPT_OSS,
        ),
        Architecture(
            *("gpt2", ("GPT2LMHeadModel",), "gpt2"),
            names=_GPT2, activation="gelu_new", eps=("layer_norm_epsilon", "layer_norm_epsilon"), rotary=False,
            outside={"token_embd": "transformer.wte", "position_embd": "transformer.wpe",
                     "output_norm": "transformer.ln_f"},
            layers="transformer.h", prefix="transformer.", own=particular.GPT2,
            changes=dict.fromkeys((f"{name}.weight" for name in ("attn_qkv", "attn_output", "ffn_up", "ffn_down")),
                                  Turned()),
        ),
        Architecture(
            *("gptneox", ("GPTNeoXForCausalLM",), "gpt_neox"),
            names=_NEOX, activation="gelu", eps=_LAYER_NORM, partial=0.25, changes=_FUSED, own=particular.GPT_NEOX,
            outside={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm",
                     "output": "embed_out"},
            layers="gpt_neox.layers",
        ),
        Architecture(
            *("falcon", ("FalconForCausalLM",), "falcon"),
            names={name: theirs for name, theirs in _BLOOM.items() if name != "ffn_norm"}, activation="gelu",
            eps=("layer_norm_epsilon", "layer_norm_epsilon"), changes=_FUSED, own=particular.FALCON,
            outside={"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f"},
            layers="transformer.h", prefix="transformer.",
        ),
        Architecture(
            *("bloom", ("BloomForCausalLM",), "bloom"),
            names=_BLOOM, activation="gelu_pytorch_tanh", eps=("layer_norm_epsilon", "layer_norm_epsilon"),
            rotary=False, changes=_FUSED, own=particular.BLOOM,
            outside={"token_embd": "transformer.word_embeddings", "output_norm": "transformer.ln_f",
                     "token_embd_norm": "transformer.word_embeddings_layernorm"},
            layers="transformer.h", prefix="transformer.",
        ),
        Architecture(
            *("mamba", ("MambaForCausalLM",), "mamba"),
            names={**_MAMBA, "ssm_x": "mixer.x_proj", "ssm_dt": "mixer.dt_proj"},
            whole={"ssm_a": "mixer.A_log", "ssm_d": "mixer.D"}, outside=_BACKBONE, layers="backbone.layers",
            eps=("layer_norm_rms_epsilon", "layer_norm_epsilon"), rotary=False, attention=False, own=particular.MAMBA,
            changes={"ssm_a": DECAY, "ssm_conv1d.weight": CONVOLUTION},
        ),
        Architecture(
            *("mamba2", ("Mamba2ForCausalLM",), "mamba2"),
            names={**_MAMBA, "ssm_norm": "mixer.norm"}, outside=_BACKBONE, layers="backbone.layers",
            whole={"ssm_a": "mixer.A_log", "ssm_d": "mixer.D", "ssm_dt.bias": "mixer.dt_bias"},
            eps=("layer_norm_rms_epsilon", "layer_norm_epsilon"), rotary=False, attention=False, own=particular.MAMBA2,
            changes={"ssm_a": DECAY_COLUMN, "ssm_d": COLUMN, "ssm_conv1d.weight": CONVOLUTION,
                     "ssm_norm.weight": in_groups},
        ),
        Architecture(
            *("bitnet", ("BitNetForCausalLM",), "bitnet"),
            names={"attn_sub_norm": "self_attn.attn_sub_norm", "ffn_sub_norm": "mlp.ffn_sub_norm"}, tied=True,
            own=particular.BITNET,
        ),
        Architecture(
            *("bert", ("BertModel",), "bert"),
            names=_BERT, activation="gelu", eps=_LAYER_NORM, rotary=False, layers="encoder.layer", prefix="bert.",
            outside={"token_embd": "embeddings.word_embeddings", "token_types": "embeddings.token_type_embeddings",
                     "position_embd": "embeddings.position_embeddings", "token_embd_norm": "embeddings.LayerNorm"},
            dropped=("pooler.", "cls.", "embeddings.position_ids"), own=particular.BERT,
        ),
    )
}  # fmt: skip
# Of Llama's architecture in GGUF, too.
MIXTRAL = Architecture(
    *("llama", ("MixtralForCausalLM",), "mixtral"),
    neighbours=True,
    experts=Experts("block_sparse_moe", "w1", "w3", "w2", inner=None),
)
# Of two norms in each layer, as Falcon 40B and 180B have them; of one name with Falcon 7B and 11B.
TWO_NORMS = ARCHITECTURES["falcon"]._replace(
    names={**ARCHITECTURES["falcon"].names, **_TWO_NORMS}, own=particular.FALCON_TWO_NORMS
)
EVERY = (*ARCHITECTURES.values(), MIXTRAL, TWO_NORMS)
# Of what Wherry runs, and why it is not here.
_NOT_IN_GGUF = {
    "GPTJForCausalLM": "llama.cpp knows the name gptj and cannot compute it",
    "OPTForCausalLM": "GGUF has no name for OPT",
    "RwkvForCausalLM": "of RWKV, llama.cpp has versions 6 and 7, and Wherry 4",
    "gptj": "llama.cpp knows its name and cannot compute it",
    "bitnet-b1.58": "a type of Microsoft's own program that llama.cpp does not read; use its safetensors",
    **dict.fromkeys(("rwkv6", "rwkv7"), "of RWKV, Wherry runs version 4"),
    **dict.fromkeys(("RobertaModel", "XLMRobertaModel", "DistilBertModel"), "of encoders, BERT's are read and written"),
}


def architecture_of(metadata: Metadata, tensors: Container[str] = ()) -> Architecture:
    """The one that a file is of.

    Args:
        tensors: their names, for architectures that are told by what there is.

    Raises:
        ModelError: unknown_architecture, with the known ones and the nearest.
    """
    name = str(metadata.get("general.architecture"))
    if name == "llama" and Fields(metadata, name).get("expert_count", int, 0):
        return MIXTRAL
    if name == "falcon" and "blk.0.attn_norm_2.weight" in tensors:
        return TWO_NORMS
    return _known(name, ARCHITECTURES, "GGUF")


def architecture_for(config: Config) -> Architecture:
    """The one that a checkpoint with this config.json becomes.

    Raises:
        ModelError: unknown_architecture.
    """
    named = config.get("architectures")
    name = str(named[0]) if isinstance(named, list) and named else "none"
    fitting = {model: a for a in EVERY if a.own.fits(config) for model in (*a.models, *a.own.also)}
    return _known(name, fitting, "config.json")


def common(architecture: Architecture, config: Config) -> Config:
    """config.json by the names that most architectures have, with what this one's own names say.

    Raises:
        KeyError, TypeError or ValueError: it is odd.
    """
    own = {name: config[alias] for alias, name in architecture.own.aliases.items() if config.get(alias) is not None}
    found = architecture.own.common({**config, **own})
    if architecture.attention and found.get("num_key_value_heads") is None:
        found["num_key_value_heads"] = found["num_attention_heads"]
    return found


def _known(name: str, known: dict[str, Architecture], where: str) -> Architecture:
    if name in known:
        return known[name]
    if (reason := _NOT_IN_GGUF.get(name)) is not None:
        raise ModelError("unknown_architecture", f"{where} architecture {name!r} is not converted: {reason}")
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ModelError(
        "unknown_architecture", f"{where} architecture {name!r} is not converted. Known: {', '.join(known)}{hint}"
    )
