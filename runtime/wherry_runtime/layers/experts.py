"""A mixture of experts: each token goes through some of many MLPs (Shazeer et al., 2017,
https://arxiv.org/abs/1701.06538), chosen by a router."""

from collections.abc import Iterator
from dataclasses import replace

import torch

from wherry_runtime.layers.activation import Activation
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.config import ExpertsConfig
from wherry_runtime.parallel.shard import Shard, Span
from wherry_runtime.quantization.storage import Storage


class ExpertMLP:
    """A gated MLP. Its result is a summand where several ranks share it."""

    def __init__(
        self, prefix: str, hidden: Span, inner: Span, activation: Activation, storage: Storage, *, bias: bool = False
    ) -> None:
        parts = [(f"{prefix}.gate_proj", inner), (f"{prefix}.up_proj", inner)]
        self.gate_up = Linear(parts, hidden, bias=bias, storage=storage, role="gate_up")
        self.down = Linear([(f"{prefix}.down_proj", hidden)], inner, bias=bias, storage=storage, role="down")
        self.activation = activation

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size] → [T, hidden_size]."""
        return self.down(self.activation(self.gate_up(x)))


class Experts:
    """Router and experts of one layer. Every rank has a part of each expert, and all of the router.

    The router stays as the checkpoint has it, whatever becomes of the experts: it decides, and takes little room.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        prefix: str,
        hidden_size: int,
        activation: Activation,
        storage: Storage,
        shard: Shard,
    ) -> None:
        def expert(name: str, width: int, *, bias: bool = False) -> ExpertMLP:
            return ExpertMLP(f"{prefix}.{name}", hidden, shard.mlp_span(width), activation, storage, bias=bias)

        def plain(name: str, outputs: int, *, bias: bool = False) -> Linear:
            return Linear([(f"{prefix}.{name}", Span.all(outputs))], hidden, bias=bias, storage=float_, role="head")

        hidden = Span.all(hidden_size)
        float_ = replace(storage, quantization="none", group=0, native=False)
        inner = config.intermediate_size
        self.router = plain("gate", config.num_experts, bias=config.bias)
        self.experts = [expert(f"experts.{i}", inner, bias=config.bias) for i in range(config.num_experts)]
        self.shared: ExpertMLP | None = None
        self.shared_gate: Linear | None = None
        if config.shared_intermediate_size:
            self.shared = expert("shared_expert", config.shared_intermediate_size)
            self.shared_gate = plain("shared_expert_gate", 1)
        self.partial = shard.size > 1
        self._config = config

    def parts(self) -> Iterator[Linear]:
        """Everything that holds weights."""
        yield self.router
        for expert in self.all():
            yield from (expert.gate_up, expert.down)
        if self.shared_gate is not None:
            yield self.shared_gate

    def all(self) -> list[ExpertMLP]:
        """Those that are chosen from, and the one that sees every token, if there is one."""
        return self.experts if self.shared is None else [*self.experts, self.shared]

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """x [T, hidden_size] → weights in x's dtype and experts int64, [T, experts_per_token] each."""
        scores, chosen = self.router(x).float(), self._config.experts_per_token
        if self._config.softmax == "chosen":
            top, experts = scores.topk(chosen, dim=-1)
            return top.softmax(dim=-1).to(x.dtype), experts
        weights, experts = scores.softmax(dim=-1).topk(chosen, dim=-1)
        if self._config.normalized:
            weights = weights / weights.sum(dim=-1, keepdim=True)
        return weights.to(x.dtype), experts

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x [T, hidden_size] → [T, hidden_size] float32, a summand where several ranks compute it.

        An expert's rows are multiplied together. They are added up in the experts' order, whatever else is in the step.
        """
        weights, experts = self.route(x)
        total = torch.zeros_like(x, dtype=torch.float32)
        for index in sorted(set(experts.flatten().tolist())):
            rows, place = torch.where(experts == index)
            result = self.experts[index](x[rows]) * weights[rows, place, None]
            total.index_add_(0, rows, result.float())
        if self.shared is not None and self.shared_gate is not None:
            total += (torch.sigmoid(self.shared_gate(x)) * self.shared(x)).float()
        return total
