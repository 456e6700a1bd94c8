"""What attention may be beyond what every backend computes."""

from wherry_runtime.loading.config import ModelConfig


def attention_features(config: ModelConfig) -> list[tuple[bool, str]]:
    """What attention may have that only PyTorch computes: whether this model's does, and its name."""
    return [
        (config.recurrent is not None, "state in place of attention"),
        (config.alibi != 0, "linear biases (ALiBi)"),
        (config.attention_softcap is not None, "soft cap of scores"),
        (config.sinks, "attention sinks"),
        (config.local_rope is not None, "second rotary embedding"),
        (config.clip_qkv is not None, "clipped queries, keys and values"),
        (config.qk_norm in ("heads", "whole"), "norms with weights of each head, or over all heads"),
        (config.qk_norm == "head" and config.norm.kind != "rms", "layer norm of queries and keys"),
    ]
