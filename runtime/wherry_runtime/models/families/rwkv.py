"""RWKV-4: attention that decays, as a recurrence in each channel (Peng et al., 2023, https://arxiv.org/abs/2305.13048)."""

from typing import Any

import torch

from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import LayerNorm
from wherry_runtime.layers.recurrent import Kept, Parameter, Part, States, project
from wherry_runtime.loading.config import Layout, ModelConfig
from wherry_runtime.loading.recurrent_config import RecurrentConfig
from wherry_runtime.models.family import RECURRENT, Family, Fields
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.storage import Role, Storage

NOTHING_YET = -1e38  # the largest exponent that has been seen
LAYOUT = Layout(
    names={
        "model.embed_tokens": "rwkv.embeddings",
        "model.layers": "rwkv.blocks",
        "model.norm": "rwkv.ln_out",
        "lm_head": "head",
    }
)


class RwkvLayer:
    """Time mixing and channel mixing, each behind a norm and beside a residual."""

    def __init__(self, name: str, config: ModelConfig, shape: RecurrentConfig, storage: Storage) -> None:
        hidden, attention, inner = config.hidden_size, shape.inner_size, config.intermediate_size
        self._index = int(name.rsplit(".", 1)[1])
        self._every = shape.rescale_every

        def norm(own: str) -> LayerNorm:
            return LayerNorm(
                f"{name}.{own}", hidden, config.norm_eps, dtype=storage.vector_dtype, device=storage.device
            )

        def linear(own: str, role: Role, outputs: int, inputs: int) -> Linear:
            part = (f"{name}.{own}", Span.all(outputs))
            return Linear([part], Span.all(inputs), bias=False, storage=storage, role=role)

        def mix(own: str) -> Parameter:
            return Parameter(f"{name}.{own}", (1, 1, hidden), storage)

        self.embedding_norm = norm("pre_ln") if self._index == 0 else None
        self.norms = (norm("ln1"), norm("ln2"))
        self.mixes = {what: mix(f"attention.time_mix_{what}") for what in ("key", "value", "receptance")}
        self.matrices = {what: linear(f"attention.{what}", "qkv", attention, hidden) for what in self.mixes}
        self.output = linear("attention.output", "output", hidden, attention)
        self.decay = Parameter(f"{name}.attention.time_decay", (attention,), storage)
        self.first = Parameter(f"{name}.attention.time_first", (attention,), storage)
        self.channel_mixes = {what: mix(f"feed_forward.time_mix_{what}") for what in ("key", "receptance")}
        self.up = linear("feed_forward.key", "gate_up", inner, hidden)
        self.gate = linear("feed_forward.receptance", "gate_up", hidden, hidden)
        self.down = linear("feed_forward.value", "down", hidden, inner)
        kept = Kept((attention,))
        self.kept = (Kept((hidden,)), Kept((hidden,)), kept, kept, Kept((attention,), NOTHING_YET))

    def parts(self) -> list[Part]:
        norms = [norm for norm in (self.embedding_norm, *self.norms) if norm is not None]
        mixes = [*self.mixes.values(), *self.channel_mixes.values()]
        matrices = [*self.matrices.values(), self.output, self.up, self.gate, self.down]
        return [*norms, *mixes, self.decay, self.first, *matrices]

    def __call__(self, x: torch.Tensor, states: States) -> tuple[torch.Tensor, States]:
        if self.embedding_norm is not None:
            x = self.embedding_norm(x)
        # What blocks add is halved as often as the residual was: a power of two, which rounds nothing.
        scale = 0.5 ** (self._index // self._every) if self._every else 1.0
        attended, *attention = self._attend(self.norms[0](x), *states[1:])
        x = x + attended * scale
        mixed, last = self._mix_channels(self.norms[1](x), states[0])
        x = x + mixed * scale
        if self._every and (self._index + 1) % self._every == 0:
            x = x / 2
        return x, (last, *attention)

    def _attend(
        self, x: torch.Tensor, last: torch.Tensor, numerator: torch.Tensor, denominator: torch.Tensor, top: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        shifted = _shifted(x, last)
        mixed = {what: _blend(x, shifted, mix.value) for what, mix in self.mixes.items()}
        key, value, gate = (
            project(self.matrices[what], mixed[what]).float() for what in ("key", "value", "receptance")
        )
        y, *state = attend(key, value, -self.decay.value.exp(), self.first.value, numerator, denominator, top)
        return project(self.output, gate.sigmoid() * y), x[:, -1].float(), *state

    def _mix_channels(self, x: torch.Tensor, last: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        shifted = _shifted(x, last)
        mixed = {what: _blend(x, shifted, mix.value) for what, mix in self.channel_mixes.items()}
        value = project(self.down, project(self.up, mixed["key"]).relu().square())
        return project(self.gate, mixed["receptance"]).sigmoid() * value, x[:, -1].float()


def _shifted(x: torch.Tensor, last: torch.Tensor) -> torch.Tensor:
    """x [B, L, width] one token later, `last` [B, width] before it."""
    return torch.cat((last.unsqueeze(1).to(x.dtype), x[:, :-1]), dim=1)


def _blend(x: torch.Tensor, shifted: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    return x * share + shifted * (1 - share)


def attend(
    key: torch.Tensor,
    value: torch.Tensor,
    decay: torch.Tensor,
    first: torch.Tensor,
    numerator: torch.Tensor,
    denominator: torch.Tensor,
    top: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A mean of the values so far, weighted by exp(key), which decays; the newest has `first` in addition.

    Numerator and denominator are held as multiples of exp(top), so that neither grows out of float32.

    Args:
        key, value: [B, L, channels] float32.
        decay, first: [channels] float32.
        numerator, denominator, top: [B, channels] float32.

    Returns:
        [B, L, channels], and the three of them after the last token.
    """
    y = torch.empty_like(key)
    for t in range(key.shape[1]):
        k, v = key[:, t], value[:, t]
        most = torch.maximum(top, k + first)
        old, new = (top - most).exp(), (k + first - most).exp()
        y[:, t] = (old * numerator + new * v) / (old * denominator + new)
        most = torch.maximum(top + decay, k)
        old, new = (top + decay - most).exp(), (k - most).exp()
        numerator, denominator, top = old * numerator + new * v, old * denominator + new, most
    return y, numerator, denominator, top


def fields(raw: dict[str, Any]) -> Fields:
    """Shapes that follow from the width where they are not named."""
    hidden = raw["hidden_size"]
    shape = {
        "kind": "rwkv",
        "inner_size": raw.get("attention_hidden_size") or hidden,
        "float32_residual": False,
        "rescale_every": max(0, raw.get("rescale_every", 6)),
    }
    return {
        "recurrent": shape,
        "norm_eps": raw.get("layer_norm_epsilon", 1e-5),
        "intermediate_size": raw.get("intermediate_size") or 4 * hidden,
        "layout": LAYOUT,
    }


FAMILY = Family(architecture="RwkvForCausalLM", name="rwkv", fields=fields, defaults=RECURRENT, rotary=False)
