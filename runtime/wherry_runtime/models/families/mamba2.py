"""Mamba-2: a state space with one decay for a head (Dao and Gu, 2024, https://arxiv.org/abs/2405.21060)."""

from typing import Any

import torch
from torch.nn import functional

from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.layers.recurrent import CausalConvolution, Kept, Parameter, Part, States, project
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.recurrent_config import RecurrentConfig
from wherry_runtime.models.families.mamba import with_state
from wherry_runtime.models.family import RECURRENT, Family, Fields, refuse
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.storage import Storage

PIECE = 64  # tokens that see one another directly; what came before them they see through the state


class Mamba2Layer:
    """A norm and a mixer beside a residual."""

    def __init__(self, name: str, config: ModelConfig, shape: RecurrentConfig, storage: Storage) -> None:
        hidden, inner, heads = config.hidden_size, shape.inner_size, shape.num_heads
        shared = shape.num_groups * shape.state_size
        own = f"{name}.mixer"
        dtype, device = storage.vector_dtype, storage.device
        self._dtype = storage.dtype
        self.norm = RMSNorm(f"{name}.norm", hidden, config.norm_eps, dtype=dtype, device=device)
        self.input = Linear(
            [(f"{own}.in_proj", Span.all(2 * inner + 2 * shared + heads))],
            Span.all(hidden),
            bias=shape.bias,
            storage=storage,
            role="gate_up",
        )
        self.output = Linear(
            [(f"{own}.out_proj", Span.all(hidden))], Span.all(inner), bias=shape.bias, storage=storage, role="down"
        )
        channels = inner + 2 * shared
        self.conv = CausalConvolution(
            f"{own}.conv1d", channels, shape.conv_kernel, bias=shape.conv_bias, storage=storage
        )
        self.step_bias = Parameter(f"{own}.dt_bias", (heads,), storage)
        self.log_decay = Parameter(f"{own}.A_log", (heads,), storage)
        self.skip = Parameter(f"{own}.D", (heads,), storage)
        self.inner_norm = Parameter(f"{own}.norm.weight", (inner,), storage)
        self.kept = (self.conv.kept, Kept((heads, shape.head_dim, shape.state_size)))
        self._shape = shape
        self._eps = config.norm_eps
        self._sizes = (inner, channels, heads)
        self._inner_sizes = (inner, shared, shared)

    def parts(self) -> list[Part]:
        small = (self.step_bias, self.log_decay, self.skip, self.inner_norm)
        return [self.norm, self.input, self.output, *self.conv.parts(), *small]

    def __call__(self, x: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        tokens, state = states
        shape, lead = self._shape, x.shape[:2]
        gate, inner, step = torch.split_with_sizes(
            project(self.input, self.norm(x.to(self._dtype))), self._sizes, dim=-1
        )
        inner, tokens = self.conv(inner, tokens)
        heads, into, out = torch.split_with_sizes(inner, self._inner_sizes, dim=-1)
        heads = heads.view(*lead, shape.num_heads, shape.head_dim)
        groups = (*lead, shape.num_groups, shape.state_size)
        step = functional.softplus(step.float() + self.step_bias.value).clamp(*shape.time_step_limit)
        y, state = scan(heads, step, -self.log_decay.value.exp(), into.view(groups), out.view(groups), state)
        y = (y + heads * self.skip.value.unsqueeze(-1)).flatten(2) * functional.silu(gate.float())
        grouped = y.view(*lead, shape.num_groups, -1)
        y = functional.rms_norm(grouped, (grouped.shape[-1],), None, self._eps).flatten(2) * self.inner_norm.value
        return x + project(self.output, y), (tokens, state)


def scan(
    x: torch.Tensor, step: torch.Tensor, decay: torch.Tensor, into: torch.Tensor, out: torch.Tensor, state: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """h ← exp(step · decay) h + step · x intoᵀ, y = h out, in pieces: section 6 of the paper.

    Args:
        x: [B, L, heads, head_dim] float32.
        step: [B, L, heads] float32.
        decay: [heads] float32, negative.
        into, out: [B, L, groups, N] float32; the heads are those of the groups, one group after the other.
        state: h, [B, heads, head_dim, N] float32.

    Returns:
        y [B, L, heads, head_dim], and h after the last token.
    """
    repeats = x.shape[2] // into.shape[2]
    pieces = []
    for begin in range(0, x.shape[1], PIECE):
        piece = slice(begin, begin + PIECE)
        added = x[:, piece] * step[:, piece].unsqueeze(-1)
        writes = into[:, piece].repeat_interleave(repeats, dim=2)
        reads = out[:, piece].repeat_interleave(repeats, dim=2)
        passed = (step[:, piece] * decay).cumsum(dim=1)  # logarithm of what is left of h since the piece began
        between = passed.unsqueeze(2) - passed.unsqueeze(1)  # [B, reader, writer, heads]
        later = torch.ones(between.shape[1:3], dtype=torch.bool, device=x.device).triu(1)
        weights = between.masked_fill(later[None, :, :, None], float("-inf")).exp()
        weights = weights * torch.einsum("bihn,bjhn->bijh", reads, writes)
        y = torch.einsum("bijh,bjhp->bihp", weights, added)
        y += torch.einsum("bihn,bhpn->bihp", reads, state) * passed.exp().unsqueeze(-1)
        pieces.append(y)
        left = (passed[:, -1:] - passed).exp().unsqueeze(-1)
        state = state * passed[:, -1].exp()[..., None, None] + torch.einsum("bjhp,bjhn->bhpn", added * left, writes)
    return torch.cat(pieces, dim=1), state


def _number(value: Any) -> float:
    """JSON has no infinity: transformers writes {"__float__": "Infinity"}."""
    return float(value["__float__"] if isinstance(value, dict) else value)


def fields(raw: dict[str, Any]) -> Fields:
    """Shapes that follow from the width where they are not named."""
    inner, heads, dim = int(raw.get("expand", 2) * raw["hidden_size"]), raw["num_heads"], raw["head_dim"]
    groups = raw.get("n_groups", 8)
    refuse(inner != heads * dim, f"{heads} heads of {dim} where {inner} channels are")
    refuse(heads % groups != 0, f"{heads} heads in {groups} groups")
    shape = {
        "kind": "mamba2",
        "inner_size": inner,
        "state_size": raw.get("state_size", 128),
        "num_heads": heads,
        "head_dim": dim,
        "num_groups": groups,
        "time_step_limit": tuple(map(_number, raw.get("time_step_limit", (0.0, "inf")))),
    }
    return with_state(raw, shape)


FAMILY = Family(
    architecture="Mamba2ForCausalLM",
    name="mamba2",
    fields=fields,
    defaults={**RECURRENT, "num_heads": 128, "head_dim": 64},
    rotary=False,
)
