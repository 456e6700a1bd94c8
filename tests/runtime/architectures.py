"""Small random models of every architecture, and of whatever its models differ in among themselves."""

from typing import Any

from tests.runtime.random_models import CASES, Case

GPT = ("intermediate_size", "num_key_value_heads")
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4, "original_max_position_embeddings": 32}


def longrope(original: int, pairs: int) -> dict[str, Any]:
    """Of a model whose original context is so long."""
    return {
        "original_max_position_embeddings": original,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 1e4,
            "short_factor": [1.0 + 0.1 * i for i in range(pairs)],
            "long_factor": [1.5 + 0.4 * i for i in range(pairs)],
        },
    }


MOE = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LISTED = ["sliding_attention", "full_attention", "sliding_attention"]
MORE = [
    Case("llama-yarn", "Llama", {"rope_parameters": YARN}),
    Case("llama-dynamic", "Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    Case("mixtral", "Mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 21}),
    Case("qwen2-moe", "Qwen2Moe", {**MOE, "shared_expert_intermediate_size": 80, "norm_topk_prob": True}),
    Case(
        "qwen2-moe-sparse",
        "Qwen2Moe",
        {**MOE, "shared_expert_intermediate_size": 80, "decoder_sparse_step": 2, "mlp_only_layers": [0]},
    ),
    Case("qwen3-moe", "Qwen3Moe", {**MOE, "head_dim": 24, "norm_topk_prob": True}),
    Case("gpt-oss", "GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16, "sliding_window": 13}),
    Case("gemma", "Gemma", {"head_dim": 24, "num_key_value_heads": 1}),
    Case("gemma2", "Gemma2", {"head_dim": 24, "sliding_window": 17, "query_pre_attn_scalar": 20}),
    Case(
        "gemma2-scores-capped-hard",
        "Gemma2",
        {"head_dim": 16, "sliding_window": 9, "attn_logit_softcapping": 0.5, "final_logit_softcapping": 1.0},
    ),
    Case(
        "gemma3", "Gemma3Text", {"head_dim": 32, "sliding_window": 15, "layer_types": LISTED}, model="Gemma3ForCausalLM"
    ),
    Case(
        "gemma3-old-file",
        "Gemma3Text",
        {"head_dim": 16, "sliding_window": 15, "rope_scaling": {"rope_type": "linear", "factor": 8.0}},
        model="Gemma3ForCausalLM",
    ),
    Case("phi", "Phi", {"num_key_value_heads": 4}),
    Case(
        "phi-qk-norm",
        "Phi",
        {"qk_layernorm": True, "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.25}},
    ),
    Case("phi3", "Phi3", {"sliding_window": 19}),
    Case("phi3-short", "Phi3", longrope(128, 8)),
    Case("phi3-long", "Phi3", longrope(64, 8)),
    Case("phi4-mini", "Phi3", {**longrope(64, 6), "partial_rotary_factor": 0.75, "tie_word_embeddings": True}),
    Case("gpt2", "GPT2", model="GPT2LMHeadModel", unknown=GPT),
    Case("gpt2-inner", "GPT2", {"n_inner": 100, "scale_attn_weights": False}, model="GPT2LMHeadModel", unknown=GPT),
    Case("gpt-neox", "GPTNeoX", unknown=("num_key_value_heads",)),
    Case(
        "gpt-neox-sequential",
        "GPTNeoX",
        {"use_parallel_residual": False, "attention_bias": False, "rotary_pct": 0.5},
        unknown=("num_key_value_heads",),
    ),
    Case("gptj", "GPTJ", {"rotary_dim": 8}, unknown=GPT),
    Case("opt", "OPT", {"ffn_dim": 100, "word_embed_proj_dim": 64}, unknown=GPT),
    Case(
        "opt-bare",
        "OPT",
        {"ffn_dim": 100, "enable_bias": False, "layer_norm_elementwise_affine": False, "activation_function": "gelu"},
        unknown=GPT,
    ),
    Case("bloom", "Bloom", unknown=(*GPT, "max_position_embeddings")),
    Case("bloom-6-heads", "Bloom", {"hidden_size": 96, "n_head": 6}, unknown=(*GPT, "num_attention_heads")),
    Case("falcon-7b", "Falcon", {"alibi": False}, unknown=GPT),
    Case("falcon-40b", "Falcon", {"new_decoder_architecture": True, "num_kv_heads": 2}, unknown=GPT),
    Case(
        "falcon-11b",
        "Falcon",
        {"new_decoder_architecture": True, "num_kv_heads": 2, "num_ln_in_parallel_attn": 1},
        unknown=GPT,
    ),
    Case(
        "falcon-alibi",
        "Falcon",
        {"alibi": True, "multi_query": False, "parallel_attn": False, "bias": True, "ffn_hidden_size": 100},
        unknown=GPT,
    ),
    Case("stablelm", "StableLm", {"use_qkv_bias": True}),
    Case("stablelm-12b", "StableLm", {"qk_layernorm": True, "use_parallel_residual": True}),
    Case("olmo", "Olmo", {"clip_qkv": 0.3}),
    Case("olmo2", "Olmo2"),
    Case(
        "granite",
        "Granite",
        {
            "embedding_multiplier": 12.0,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.08,
            "logits_scaling": 4.0,
            "tie_word_embeddings": True,
        },
    ),
    Case("cohere", "Cohere", {"logit_scale": 1.5}),
    Case("cohere-plus", "Cohere", {"use_qk_norm": True, "attention_bias": True, "logit_scale": 1.5}),
    Case("bitnet", "BitNet"),
]
ARCHITECTURES = [*CASES, *MORE]
# Of `MORE`: what the kernels compute; of `CASES`, they compute everything.
NATIVE = {case.name for case in MORE} - {
    *("mixtral", "qwen2-moe", "qwen2-moe-sparse", "qwen3-moe", "gpt-oss"),
    *("phi-qk-norm", "stablelm-12b", "cohere-plus"),
}
CUDA = {
    *("llama-yarn", "llama-dynamic", "phi3", "phi3-short", "phi3-long", "phi4-mini"),
    *("gemma", "phi", "gpt2", "gpt2-inner", "gpt-neox", "gpt-neox-sequential", "gptj", "opt", "opt-bare", "falcon-7b"),
    *("falcon-40b", "falcon-11b", "stablelm", "granite", "cohere", "bitnet"),
}
