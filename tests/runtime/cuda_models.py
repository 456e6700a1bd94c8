"""Helpers: random models without a checkpoint, and sequences that go through a backend in any chunks.

Kernels run on the GPU where there is one, else in Triton's interpreter, on tensors in CPU memory (tests/conftest.py).
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from wherry_runtime.engine.runner import Model, ModelRunner
from wherry_runtime.kernels.cuda.support import interpreted
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

pytest.importorskip("triton")  # not in PyTorch's builds for CPUs

DEVICE = torch.device("cpu" if interpreted() else "cuda")
BLOCK_SIZE = 4
NUM_BLOCKS = 64
# Everything that families differ in, as their config.json says it.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama-tied": {"architectures": ["LlamaForCausalLM"], "tie_word_embeddings": True},
    "llama-biases": {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": True,
        "mlp_bias": True,
        "head_dim": 24,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "mistral-window": {"architectures": ["MistralForCausalLM"], "sliding_window": 21, "num_attention_heads": 6},
    "qwen2-two-windows": {
        "architectures": ["Qwen2ForCausalLM"],
        "use_sliding_window": True,
        "sliding_window": 17,
        "max_window_layers": 1,
        "num_hidden_layers": 2,
    },
    "qwen3": {"architectures": ["Qwen3ForCausalLM"], "head_dim": 48},
}
SMALL = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}


def model_config(directory: Path, **settings: Any) -> ModelConfig:
    """A small model's configuration, through a config.json."""
    (directory / "config.json").write_text(json.dumps({**SMALL, **settings}))
    return read_config(directory)


def random_model(config: ModelConfig, storage: Storage) -> Decoder:
    """A model whose weights depend on nothing but their names' order: equal, before rounding, in every storage."""
    generator = torch.Generator().manual_seed(7)
    with torch.inference_mode():
        model = Decoder(config, config.max_position_embeddings, storage)
        for name, slot in sorted(model.slots().items()):
            noise = torch.randn(slot.shape, generator=generator)
            slot.fill(1 + 0.1 * noise if "norm" in name else 0.1 * noise)
    return model


def new_cache(config: ModelConfig, stored: str) -> PagedKVCache:
    return PagedKVCache(config, NUM_BLOCKS, BLOCK_SIZE, dtype=FORMATS[stored], device=DEVICE)


@dataclass
class Fed:
    """A sequence, as far as it has been computed. Its blocks come in no order."""

    name: str
    tokens: list[int]
    blocks: "np.ndarray[tuple[int], np.dtype[np.int32]]"
    done: int = 0

    def next(self, count: int, *, samples: bool = True) -> SequenceStep:
        start, self.done = self.done, self.done + count
        return SequenceStep(self.name, self.tokens[start : self.done], start, self.blocks, samples)


def sequences(lengths: Sequence[int], seed: int = 3) -> list[Fed]:
    """Random sequences that share no block."""
    generator = torch.Generator().manual_seed(seed)
    free = torch.randperm(NUM_BLOCKS, generator=generator).to(torch.int32).numpy()
    fed = []
    for index, length in enumerate(lengths):
        size = -(-length // BLOCK_SIZE)
        tokens = torch.randint(0, SMALL["vocab_size"], (length,), generator=generator).tolist()
        fed.append(Fed(f"r{index}", tokens, free[:size].copy()))
        free = free[size:]
    return fed


@dataclass
class Pair:
    """The same steps through two backends."""

    expected: ModelRunner
    found: ModelRunner
    logits: list[torch.Tensor] = field(default_factory=list)  # of `found`

    @classmethod
    def of(cls, expected: Model, found: Model) -> "Pair":
        return cls(ModelRunner(expected), ModelRunner(found))

    def step(self, steps: list[SequenceStep], *, atol: float) -> None:
        """Logits of both must be as near to one another."""
        expected, ids = self.expected.logits(steps)
        found, found_ids = self.found.logits(steps)
        assert ids == found_ids
        torch.testing.assert_close(found, expected, atol=atol, rtol=0)
        self.logits.append(found.clone())
