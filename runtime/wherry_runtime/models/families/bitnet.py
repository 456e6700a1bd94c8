"""BitNet b1.58: squared ReLU, and norms before the output and down projections (https://arxiv.org/abs/2402.17764,
https://arxiv.org/abs/2504.12285)."""

from typing import Any

from wherry_runtime.models.family import Family, Fields, flag


def fields(raw: dict[str, Any]) -> Fields:
    """Norms and biases."""
    bias = flag(raw, "attention_bias")
    return {"sub_norms": True, "qkv_bias": bias, "output_bias": bias}


FAMILY = Family(
    architecture="BitNetForCausalLM",
    name="bitnet",
    fields=fields,
    defaults={"hidden_act": "relu2", "rms_norm_eps": 1e-5},
    theta=500000.0,
)
