"""A random model of each architecture that GGUF files are written of."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tests.runtime.architectures import GPT, YARN, longrope
from tests.runtime.random_models import LLAMA3_ROPE, Case

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
OSS = {
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 13,
    "attention_bias": True,
}
SEQUENTIAL = {"use_parallel_residual": False, "rotary_pct": 0.5}
STATES = (*GPT, "num_attention_heads", "max_position_embeddings")
FACTORS = {
    "embedding_multiplier": 6.0,
    "residual_multiplier": 0.4,
    "attention_multiplier": 0.3,
    "logits_scaling": 1.5,
}
LINEAR = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
MODELS = [
    Case("llama", "Llama", {"rope_parameters": LLAMA3_ROPE, "attention_bias": True}),
    Case("llama-yarn", "Llama", {"rope_parameters": YARN}),
    Case("qwen2", "Qwen2", {"tie_word_embeddings": True, "hidden_size": 128}),
    Case("qwen3", "Qwen3", {"head_dim": 48, "tie_word_embeddings": False}),
    Case("gemma", "Gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    Case("gemma2", "Gemma2", {"head_dim": 24, "sliding_window": 17, "query_pre_attn_scalar": 24}),
    Case(
        *("gemma3", "Gemma3Text"),
        {"head_dim": 32, "sliding_window": 15, "query_pre_attn_scalar": 32, "num_hidden_layers": 7},
        model="Gemma3ForCausalLM",
    ),
    Case(
        *("gemma3-linear", "Gemma3Text"),
        {"head_dim": 32, "sliding_window": 15, "query_pre_attn_scalar": 32, "num_hidden_layers": 6}
        | {"rope_parameters": LINEAR},
        model="Gemma3ForCausalLM",
    ),
    Case("phi3", "Phi3", {"sliding_window": None}),
    Case("phi3-longrope", "Phi3", longrope(128, 8)),
    Case("phi4-mini", "Phi3", {**longrope(64, 6), "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    Case("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}),
    Case("qwen2-moe", "Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 80}),
    Case("qwen3-moe", "Qwen3Moe", {**MOE, "head_dim": 24, "norm_topk_prob": True}),
    Case("granite", "Granite", FACTORS),
    Case("command-r", "Cohere", {"logit_scale": 0.3}),
    Case("stablelm", "StableLm", {"use_qkv_bias": True}),
    Case("phi2", "Phi", {"num_key_value_heads": 4}),
    Case("olmo", "Olmo", {"clip_qkv": 0.4}),
    Case("olmo2", "Olmo2"),
    Case("gpt-oss", "GptOss", OSS),
    Case("gpt-oss-without-yarn", "GptOss", {**OSS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    Case("gpt2", "GPT2", {"n_inner": 96}, model="GPT2LMHeadModel", unknown=GPT),
    Case("gpt-neox", "GPTNeoX", unknown=("num_key_value_heads",)),
    Case("gpt-neox-sequential", "GPTNeoX", SEQUENTIAL, unknown=("num_key_value_heads",)),
    Case("falcon-7b", "Falcon", {"alibi": False}, unknown=GPT),
    Case("falcon-40b", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, unknown=GPT),
    Case(
        *("falcon-11b", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1}),
        unknown=GPT,
    ),
    Case("bloom", "Bloom", unknown=(*GPT, "max_position_embeddings")),
    Case("mamba", "Mamba", unknown=STATES),
    Case("mamba2", "Mamba2", {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 2}, unknown=STATES),
    Case("bert", "Bert", {"pad_token_id": 0}, model="BertModel", unknown=("num_key_value_heads",)),
    Case("bitnet", "BitNet", {"hidden_act": "silu", "tie_word_embeddings": True}),
]


def published(case: Case, directory: Path) -> Path:
    """A GPT-OSS whose experts are in MXFP4, as OpenAI has them."""
    case.build(directory)
    tensors, generator = load_file(directory / "model.safetensors"), torch.Generator().manual_seed(5)
    for name in [n for n in tensors if n.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = tensors.pop(name).shape
        shape = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), generator=generator, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(118, 124, shape, generator=generator, dtype=torch.uint8)
    save_file(tensors, directory / "model.safetensors")
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4"}
    (directory / "config.json").write_text(json.dumps(config))
    return directory
