"""The shape of a model that keeps a state instead of keys and values."""

from typing import Annotated, Literal

import msgspec

Positive = Annotated[int, msgspec.Meta(ge=1)]


class RecurrentConfig(msgspec.Struct, frozen=True, kw_only=True):
    """What of a model without attention its `ModelConfig` does not say.

    Attributes:
        kind: what its layers are.
        inner_size: width of what the state is updated with.
        state_size: numbers that a channel (a head's channel, in Mamba-2) keeps.
        conv_kernel: tokens that the convolution before the state sees.
        time_step_rank: width that a channel's step in time is projected from (Mamba).
        num_heads, head_dim, num_groups: of the state; a group's heads share inputs and outputs (Mamba-2).
        time_step_limit: what steps in time are cut off at (Mamba-2).
        bias, conv_bias: of projections and of the convolution.
        float32_residual: what layers add up to is kept in float32, whatever they compute in.
        rescale_every: layers after which everything is halved, so that it does not grow too large for float16 (RWKV);
            0: never.
    """

    kind: Literal["mamba", "mamba2", "rwkv"]
    inner_size: Positive
    state_size: Positive = 1
    conv_kernel: Positive = 1
    time_step_rank: Positive = 1
    num_heads: Positive = 1
    head_dim: Positive = 1
    num_groups: Positive = 1
    time_step_limit: tuple[float, float] = (0.0, float("inf"))
    bias: bool = False
    conv_bias: bool = True
    float32_residual: bool = True
    rescale_every: Annotated[int, msgspec.Meta(ge=0)] = 0
