"""What a checkpoint calls the tensors of a GGUF file, and what of theirs lies otherwise there. Names and meanings:
llama.cpp's gguf-py/gguf/constants.py and src/llama-arch.cpp."""

import re
from typing import NamedTuple

from wherry_runtime.formats.gguf import changes, fused_experts
from wherry_runtime.formats.gguf.architectures import Architecture, common
from wherry_runtime.formats.gguf.changes import AS_IT_IS, ONLY_ROW, Change, Shape
from wherry_runtime.formats.gguf.fields import Config
from wherry_runtime.formats.gguf.reader import TensorInfo
from wherry_runtime.formats.gguf.types import GGMLType
from wherry_runtime.loading.errors import ModelError

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
_LAYER = re.compile(r"blk\.(\d+)\.([\w.]+)")
_KIND = re.compile(r"(.+)\.(weight|bias)")
_EXPERT = re.compile(r"(\w+)\.experts\.(\d+)\.(\w+)")
# What frequencies are divided by, each [rotated / 2] float32: Llama 3's, and of long and short contexts.
ROPE_FACTORS = "rope_freqs.weight"
LONG_FACTORS, SHORT_FACTORS = "rope_factors_long.weight", "rope_factors_short.weight"
FACTORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)


class Part(NamedTuple):
    """A tensor of a checkpoint in a GGUF file.

    Attributes:
        type: of what is read.
        stored: what it is in the file: one tensor, or what of it is its part; several for fused experts.
        change: what is undone.
        fused: how several become one.
    """

    shape: Shape
    type: GGMLType
    stored: tuple[TensorInfo, ...]
    change: Change = AS_IT_IS
    fused: fused_experts.Join | None = None


def parts_of(architecture: Architecture, infos: dict[str, TensorInfo], config: Config) -> dict[str, Part]:
    """Name in a checkpoint → tensor, in the order of the file. All experts' matrices come one by one, or, where a
    checkpoint has them so, fused; what is part of the configuration does not come.

    Raises:
        ModelError: unexpected_tensors.
    """
    found: dict[str, Part] = {}
    experts: dict[str, TensorInfo] = {}
    for info in infos.values():
        if info.name in FACTORS:
            continue
        for name, part in _parts(architecture, info, config).items():
            if architecture.experts is not None and architecture.experts.fused and fused_experts.is_one(name):
                experts[name] = part.stored[0]
            else:
                found[name] = part
    if experts:
        for name, (shape, kind, stored, join) in fused_experts.joined(experts).items():
            found[name] = Part(shape, kind, stored, fused=join)
    return found


def _parts(architecture: Architecture, info: TensorInfo, config: Config) -> dict[str, Part]:
    """`blk.3.ffn_up.weight` → `model.layers.3.mlp.up_proj.weight`, or the same for each expert."""
    change = change_of(architecture, info.name, config)
    try:
        whole = Part(change.shape_back(info.shape), change.held(info.type), (info,), change)
    except IndexError:
        raise ModelError("wrong_shape", f"tensor {info.name} is of shape {list(info.shape)}") from None
    match = _LAYER.fullmatch(info.name)
    if match is None:
        stem, kind = _split(info.name)
        if (outside := {**_OUTSIDE, **architecture.outside}.get(stem)) is not None:
            return {f"{outside}.{kind}": whole}
    else:
        layer, (module, kind) = f"{architecture.layers}.{match[1]}", _split(match[2])
        if (name := architecture.whole.get(match[2])) is not None:
            return {f"{layer}.{name}": whole}
        if (expert := _stacked(architecture).get(module)) is not None and architecture.experts is not None:
            names = f"{layer}.{architecture.experts.module}.experts"
            if architecture.experts.fused:
                return {f"{names}.{expert}.{kind}": whole}
            if len(info.shape) == 3:
                return {f"{names}.{i}.{expert}.{kind}": part for i, part in enumerate(_cut(info))}
        elif (name := _modules(architecture).get(module)) is not None:
            return {f"{layer}.{name}.{kind}": whole}
    raise ModelError("unexpected_tensors", f"tensor {info.name} has no place in {architecture.name} here")


def _split(name: str) -> tuple[str, str]:
    """Module, and weight or bias; neither has any name if it is none of both."""
    match = _KIND.fullmatch(name)
    return (match[1], match[2]) if match else ("", "")


def _cut(info: TensorInfo) -> list[Part]:
    """What `info` is a stack of."""
    size, shape = info.nbytes // info.shape[0], info.shape[1:]
    return [
        Part(shape, info.type, (info._replace(shape=shape, offset=info.offset + i * size, nbytes=size),))
        for i in range(info.shape[0])
    ]


def _modules(architecture: Architecture) -> dict[str, str]:
    """A layer's modules: name in GGUF → in a checkpoint."""
    found = {**(_INSIDE if architecture.layers == "model.layers" else {}), **architecture.names}
    if (experts := architecture.experts) is not None:
        found["ffn_gate_inp"] = f"{experts.module}.{experts.router}"
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


def gguf_name(architecture: Architecture, name: str) -> tuple[str, int | None] | None:
    """`model.layers.3.mlp.up_proj.weight` → `blk.3.ffn_up.weight`, and which of the stack there, if it is one. None:
    GGUF has no use for it.

    Raises:
        ModelError: unexpected_tensors.
    """
    prefix = architecture.prefix
    for given in (name, prefix + name, name.removeprefix(prefix)) if prefix else (name,):
        if given.startswith(architecture.dropped):
            return None
        if (found := _named(architecture, given)) is not None:
            return found
    raise ModelError("unexpected_tensors", f"tensor {name} has no name in GGUF files of {architecture.name}")


def _named(architecture: Architecture, name: str) -> tuple[str, int | None] | None:
    stem, kind = _split(name)
    outside = {theirs: ours for ours, theirs in {**_OUTSIDE, **architecture.outside}.items()}
    if stem in outside:
        return f"{outside[stem]}.{kind}", None
    match = re.fullmatch(re.escape(architecture.layers) + r"\.(\d+)\.([\w.]+)", name)
    if match is None:
        return None
    whole = {theirs: ours for ours, theirs in architecture.whole.items()}
    if match[2] in whole:
        return f"blk.{match[1]}.{whole[match[2]]}", None
    module, kind = _split(match[2])
    back = {theirs: ours for ours, theirs in _modules(architecture).items()}
    if module in back:
        return f"blk.{match[1]}.{back[module]}.{kind}", None
    return _expert_named(architecture, match[1], module, kind)


def _expert_named(architecture: Architecture, layer: str, module: str, kind: str) -> tuple[str, int | None] | None:
    experts, stacks = architecture.experts, {theirs: ours for ours, theirs in _stacked(architecture).items()}
    if experts is None:
        return None
    if experts.fused:
        own = module.removeprefix(f"{experts.module}.experts.")
        return (f"blk.{layer}.{stacks[own]}.{kind}", None) if own != module and own in stacks else None
    expert = _EXPERT.fullmatch(module)
    if expert is None or expert[1] != experts.module or expert[3] not in stacks:
        return None
    return f"blk.{layer}.{stacks[expert[3]]}.{kind}", int(expert[2])


def change_of(architecture: Architecture, name: str, config: Config) -> Change:
    """What GGUF has otherwise in a tensor (by its name there).

    Args:
        config: with the heads that rows belong to.

    Raises:
        ModelError: bad_config.
    """
    if architecture.offset and name.endswith("norm.weight"):
        return changes.increased(architecture.offset)
    match = _LAYER.fullmatch(name)
    own = match[2] if match else name
    try:
        if architecture.neighbours and own.rpartition(".")[0] in ("attn_q", "attn_k"):
            heads = common(architecture, config)["num_attention_heads" if "_q" in own else "num_key_value_heads"]
            return changes.neighbours(int(heads))
        if own == "ffn_gate_inp_shexp.weight":
            return ONLY_ROW
        made = architecture.changes.get(own, AS_IT_IS)
        return made if isinstance(made, Change) else made(common(architecture, config))
    except (KeyError, TypeError, ValueError) as e:
        raise ModelError("bad_config", f"config.json: {type(e).__name__}: {e}") from None
