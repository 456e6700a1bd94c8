"""Mixtral: Mistral with eight experts, of which two see each token (https://arxiv.org/abs/2401.04088)."""

from typing import Any

from wherry_runtime.loading.config import ExpertsConfig, Layout, count
from wherry_runtime.models.families import mistral
from wherry_runtime.models.family import Family, Fields

LAYOUT = Layout(
    names={
        "mlp.gate": "block_sparse_moe.gate",
        "mlp.experts.{}.gate_proj": "block_sparse_moe.experts.{}.w1",
        "mlp.experts.{}.up_proj": "block_sparse_moe.experts.{}.w3",
        "mlp.experts.{}.down_proj": "block_sparse_moe.experts.{}.w2",
    },
)


def fields(raw: dict[str, Any]) -> Fields:
    """The window and the experts, in every layer."""
    experts = ExpertsConfig(
        layers=(True,) * count(raw, "num_hidden_layers"),
        num_experts=raw["num_local_experts"],
        experts_per_token=raw["num_experts_per_tok"],
        intermediate_size=raw["intermediate_size"],
    )
    return {**mistral.fields(raw), "experts": experts, "layout": LAYOUT}


FAMILY = Family(
    architecture="MixtralForCausalLM",
    name="mixtral",
    fields=fields,
    defaults={"rms_norm_eps": 1e-5, "num_local_experts": 8, "num_experts_per_tok": 2},
    aliases={"num_experts": "num_local_experts"},
    theta=1e6,
)
