"""What models may have that neither the native CPU kernels nor those in Triton compute."""

from wherry_runtime.loading.config import ModelConfig


def beyond_kernels(config: ModelConfig) -> list[tuple[bool, str]]:
    """What only PyTorch computes: whether this model has it, and its name."""
    return [
        (config.recurrent is not None, "state in place of attention"),
        (config.sinks, "attention sinks"),
        (config.qk_norm == "head" and config.norm.kind != "rms", "layer norm of queries and keys"),
        (config.experts is not None, "experts"),
    ]
