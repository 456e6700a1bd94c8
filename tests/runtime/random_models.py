"""Random-init checkpoints of each family, made and saved by transformers."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
from tests.runtime.engines import VOCAB_SIZE, save_byte_tokenizer

SMALL = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "initializer_range": 0.08,
    "eos_token_id": None,
    "bos_token_id": None,
    "pad_token_id": None,
}


@dataclass(frozen=True)
class Case:
    """A family and what is special about this one.

    Attributes:
        family: of transformers: what `…Config` begins with.
        settings: of its configuration, beside the common small ones.
        unknown: common settings that it does not have.
        model: transformers' class, where it is not `…ForCausalLM`.
    """

    name: str
    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    shard_size: str = "1GB"
    unknown: tuple[str, ...] = ()
    model: str = ""

    def build(self, directory: Path) -> transformers.PreTrainedModel:
        """Saves the checkpoint to `directory`; biases and norms are random too, unlike a fresh model's."""
        common = {key: value for key, value in SMALL.items() if key not in self.unknown}
        config = getattr(transformers, f"{self.family}Config")(**{**common, **self.settings})
        torch.manual_seed(7)
        model = getattr(transformers, self.model or f"{self.family}ForCausalLM")(config)
        model = model.float().eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 or "bias" in name or "norm" in name:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(directory, max_shard_size=self.shard_size)
        save_byte_tokenizer(directory)
        return model


LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
CASES = [
    Case("llama-tied", "Llama", {"tie_word_embeddings": True}),
    Case("llama-biases-sharded", "Llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 24}, "100KB"),
    Case("llama3-rope", "Llama", {"rope_parameters": LLAMA3_ROPE}),
    Case("llama-linear-rope", "Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}}),
    Case("mistral-window", "Mistral", {"sliding_window": 21, "head_dim": 32}),
    Case("mistral-no-window", "Mistral", {"sliding_window": None, "num_key_value_heads": 4}),
    Case("qwen2", "Qwen2", {"tie_word_embeddings": True, "hidden_size": 128}),
    Case("qwen2-window", "Qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    Case("qwen3", "Qwen3", {"head_dim": 48, "tie_word_embeddings": False}),
    Case("qwen3-tied", "Qwen3", {"head_dim": 16, "tie_word_embeddings": True, "attention_bias": True}),
]
