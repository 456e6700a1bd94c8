"""A random model of each architecture that GGUF files are written of."""

from tests.runtime.architectures import longrope
from tests.runtime.random_models import LLAMA3_ROPE, Case

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
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
]
