"""Mamba: a selective state space in each channel (Gu and Dao, 2023, https://arxiv.org/abs/2312.00752)."""

import math
from typing import Any

import torch
from torch.nn import functional

from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.layers.recurrent import CausalConvolution, Kept, Parameter, Part, States, project
from wherry_runtime.loading.config import Layout, ModelConfig
from wherry_runtime.loading.recurrent_config import RecurrentConfig
from wherry_runtime.models.family import RECURRENT, Family, Fields, flag, refuse
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.storage import Storage

PIECE = 32  # tokens whose decays are held at once: [B, PIECE, inner, state] float32
LAYOUT = Layout(
    names={
        "model.embed_tokens": "backbone.embeddings",
        "model.layers": "backbone.layers",
        "model.norm": "backbone.norm_f",
    }
)


class MambaLayer:
    """A norm and a mixer beside a residual."""

    def __init__(self, name: str, config: ModelConfig, shape: RecurrentConfig, storage: Storage) -> None:
        hidden, inner, rank, state = config.hidden_size, shape.inner_size, shape.time_step_rank, shape.state_size
        made: dict[str, Any] = {"storage": storage}
        own = f"{name}.mixer"
        dtype, device = storage.vector_dtype, storage.device
        self._dtype = storage.dtype
        self.norm = RMSNorm(f"{name}.norm", hidden, config.norm_eps, dtype=dtype, device=device)
        self.input = Linear(
            [(f"{own}.in_proj", Span.all(2 * inner))], Span.all(hidden), bias=shape.bias, role="gate_up", **made
        )
        # Small, and everything that the state does hangs on them: held as finely as the head.
        self.select = Linear(
            [(f"{own}.x_proj", Span.all(rank + 2 * state))], Span.all(inner), bias=False, role="head", **made
        )
        self.step = Linear([(f"{own}.dt_proj", Span.all(inner))], Span.all(rank), bias=False, role="head", **made)
        self.step_bias = Parameter(f"{own}.dt_proj.bias", (inner,), storage)
        self.output = Linear(
            [(f"{own}.out_proj", Span.all(hidden))], Span.all(inner), bias=shape.bias, role="down", **made
        )
        self.conv = CausalConvolution(f"{own}.conv1d", inner, shape.conv_kernel, bias=shape.conv_bias, storage=storage)
        self.log_decay = Parameter(f"{own}.A_log", (inner, state), storage)
        self.skip = Parameter(f"{own}.D", (inner,), storage)
        self.kept = (self.conv.kept, Kept((inner, state)))
        self._sizes = (rank, state, state)

    def parts(self) -> list[Part]:
        matrices = (self.input, self.select, self.step, self.output)
        return [self.norm, *matrices, self.step_bias, *self.conv.parts(), self.log_decay, self.skip]

    def __call__(self, x: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        tokens, state = states
        inner, gate = project(self.input, self.norm(x.to(self._dtype))).chunk(2, dim=-1)
        inner, tokens = self.conv(inner, tokens)
        rank, into, out = torch.split_with_sizes(project(self.select, inner), self._sizes, dim=-1)
        step = functional.softplus(project(self.step, rank).float() + self.step_bias.value)
        y, state = scan(inner, step, -self.log_decay.value.exp(), into.float(), out.float(), state)
        y = (y + inner * self.skip.value) * functional.silu(gate.float())
        return x + project(self.output, y), (tokens, state)


def scan(
    x: torch.Tensor, step: torch.Tensor, decay: torch.Tensor, into: torch.Tensor, out: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """h ← exp(step · decay) h + step · x · into, y = h · out, for one token after the other.

    Args:
        x, step: [B, L, channels] float32.
        decay: [channels, N] float32, negative.
        into, out: [B, L, N] float32.
        state: h, [B, channels, N] float32.

    Returns:
        y [B, L, channels], and h after the last token.
    """
    y = torch.empty_like(x)
    for begin in range(0, x.shape[1], PIECE):
        piece = slice(begin, begin + PIECE)
        kept = (step[:, piece, :, None] * decay).exp_()
        added = (step[:, piece] * x[:, piece]).unsqueeze(-1) * into[:, piece, None, :]
        for t in range(kept.shape[1]):
            state = torch.addcmul(added[:, t], kept[:, t], state)
            y[:, begin + t] = (state @ out[:, begin + t].unsqueeze(-1)).squeeze(-1)
    return y, state


def with_state(raw: dict[str, Any], shape: dict[str, Any]) -> Fields:
    """The fields of both Mambas: `shape` is what one of them says of its state."""
    refuse(raw.get("hidden_act", "silu") not in ("silu", "swish"), f"hidden_act {raw.get('hidden_act')!r}")
    shared = {
        "conv_kernel": raw.get("conv_kernel", 4),
        "bias": flag(raw, "use_bias"),
        "conv_bias": flag(raw, "use_conv_bias", default=True),
        "float32_residual": flag(raw, "residual_in_fp32", default=True),
    }
    return {"recurrent": shape | shared, "norm_eps": raw.get("layer_norm_epsilon", 1e-5), "layout": LAYOUT}


def fields(raw: dict[str, Any]) -> Fields:
    """Shapes that follow from the width where they are not named."""
    hidden, rank = raw["hidden_size"], raw.get("time_step_rank", "auto")
    shape = {
        "kind": "mamba",
        "inner_size": raw.get("intermediate_size") or int(raw.get("expand", 2) * hidden),
        "state_size": raw.get("state_size", 16),
        "time_step_rank": math.ceil(hidden / 16) if rank == "auto" else rank,
    }
    return with_state(raw, shape)


FAMILY = Family(
    architecture="MambaForCausalLM",
    name="mamba",
    fields=fields,
    defaults={**RECURRENT, "tie_word_embeddings": True},
    rotary=False,
)
