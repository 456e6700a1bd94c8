"""Checkpoints with random weights in the shapes that are compared: `python -m benchmarks.engine.models 1.1b 0.5b`.

Speed does not depend on what the weights are. They are drawn as at the start of training, so that activations stay in a
sane range, and the tokenizer is the sample model's with words added until it has the shape's vocabulary.
"""

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SAMPLE = ROOT / "examples" / "models" / "tiny"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "wherry" / "bench"
MODELS = CACHE / "models"
STANDARD_DEVIATION = 0.02

SHAPES: dict[str, dict[str, Any]] = {
    "1.1b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "vocab_size": 32000,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "1b-tied": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 64,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 32.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": True,
        "attention_bias": False,
        "mlp_bias": False,
    },
    "0.5b": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 896,
        "intermediate_size": 4864,
        "num_hidden_layers": 24,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "vocab_size": 151936,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": True,
        "use_sliding_window": False,
    },
}
COMMON = {"hidden_act": "silu", "dtype": "bfloat16", "torch_dtype": "bfloat16", "eos_token_id": 2, "bos_token_id": 1}


def tensor_shapes(config: dict[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of each tensor of a Llama or Qwen2 checkpoint, in the order of the file."""
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    yield "model.embed_tokens.weight", (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name, rows in (("q_proj", hidden), ("k_proj", kv), ("v_proj", kv)):
            yield f"{prefix}self_attn.{name}.weight", (rows, hidden)
            if config["model_type"] == "qwen2":
                yield f"{prefix}self_attn.{name}.bias", (rows,)
        yield f"{prefix}self_attn.o_proj.weight", (hidden, hidden)
        yield f"{prefix}mlp.gate_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.up_proj.weight", (inner, hidden)
        yield f"{prefix}mlp.down_proj.weight", (hidden, inner)
        yield f"{prefix}input_layernorm.weight", (hidden,)
        yield f"{prefix}post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not config["tie_word_embeddings"]:
        yield "lm_head.weight", (config["vocab_size"], hidden)


def write_weights(directory: Path, config: dict[str, Any]) -> None:
    """bfloat16 safetensors: norms are one, everything else is drawn from a normal distribution with a fixed seed."""
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, shape in tensor_shapes(config):
        if "norm" in name:
            tensors[name] = torch.ones(shape, dtype=torch.bfloat16)
        else:
            draw = torch.empty(shape, dtype=torch.bfloat16)
            tensors[name] = draw.normal_(std=STANDARD_DEVIATION, generator=generator)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def write_tokenizer(directory: Path, vocab_size: int) -> None:
    """The sample model's tokenizer, its vocabulary filled up with words that no merge makes."""
    tokenizer = json.loads((SAMPLE / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    for token in range(len(vocab), vocab_size):
        vocab[f"Ġw{token}"] = token
    (directory / "tokenizer.json").write_text(json.dumps(tokenizer, ensure_ascii=False))
    (directory / "tokenizer_config.json").write_text((SAMPLE / "tokenizer_config.json").read_text())


def make(name: str) -> Path:
    """The directory of the checkpoint called `name`, made if it is not there. `tiny` is the sample model."""
    if name == "tiny":
        return SAMPLE
    directory = MODELS / name
    done = directory / "config.json"  # written last
    if not done.exists():
        directory.mkdir(parents=True, exist_ok=True)
        config = {**COMMON, **SHAPES[name]}
        write_tokenizer(directory, config["vocab_size"])
        write_weights(directory, config)
        (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "bos_token_id": 1}))
        done.write_text(json.dumps(config, indent=1))
    return directory


def vocab_size(directory: Path) -> int:
    """How many tokens a checkpoint knows."""
    return int(json.loads((directory / "config.json").read_text())["vocab_size"])


if __name__ == "__main__":
    for wanted in sys.argv[1:] or SHAPES:
        print(make(wanted))
