"""The CUDA backend beside torch.compile with CUDA graphs, and beside what the GPU's memory allows, in one run.

    python -m benchmarks.cuda_engine [--rounds 5] [--json out.json]

Random weights in the shape of TinyLlama 1.1B, bfloat16 (and int8, int4 for ours). *Decode*: sequences with 128 tokens
each, one token more a step, greedy; tokens per second, and (weights + keys and values that a step reads) · steps per
second as a share of the read bandwidth, measured in the same run. *Prefill*: a prompt of 512 tokens until its first
token is known. Both are the median over rounds, in which everybody takes turns.

The other side is the loop that PyTorch's own examples recommend: one static KV cache, `scaled_dot_product_attention`
over all of it, the whole step compiled with `mode="reduce-overhead"`, which records it as a CUDA graph. It has no
paging, no batching that changes, and a context of exactly what is measured: the least that a decoder can do.
"""

import argparse
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch.nn import functional

from wherry_protocol.engine_config import Quantization
from wherry_runtime.engine.backend import build
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.kernels.cuda.support import unavailable
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.rope_config import RopeConfig
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

CONTEXT, PROMPT, BATCHES = 128, 512, (1, 16)
BLOCK_SIZE = 16
SHAPE_1_1B = ModelConfig(
    family="llama",
    architecture="LlamaForCausalLM",
    dtype="bfloat16",
    vocab_size=32000,
    hidden_size=2048,
    intermediate_size=5632,
    num_layers=22,
    num_heads=32,
    num_kv_heads=4,
    head_dim=64,
    max_position_embeddings=2048,
    norm_eps=1e-5,
    rope=RopeConfig(),
    tie_word_embeddings=False,
)


@dataclass
class Result:
    """A line of the table."""

    engine: str
    weights: str
    what: str
    batch: int
    tokens_per_second: float
    share: float | None  # of the read bandwidth


def random_model(config: ModelConfig, device: torch.device, quantization: Quantization = "none") -> Decoder:
    """A model whose numbers stay in range."""
    storage = Storage(torch.bfloat16 if device.type == "cuda" else torch.float32, device, quantization)
    with torch.inference_mode():
        model = Decoder(config, config.max_position_embeddings, storage)
        generator = torch.Generator(device).manual_seed(0)
        for slot in model.slots().values():
            noise = torch.randn(slot.shape, generator=generator, device=device)
            slot.fill(1 + 0.1 * noise if noise.dim() == 1 else 0.02 * noise)
    return model


def step_bytes(model: Decoder, batch: int, context: int) -> int:
    """What a decode step must read: every matrix once, and the keys and values of each sequence."""
    config = model.config
    weights = sum(t.nbytes for part in model.parts() if isinstance(part, Linear) for t in part.state().values())
    kv = 2 * config.num_layers * config.num_kv_heads * config.head_dim * model.storage.dtype.itemsize
    return weights + batch * context * kv


class Ours:
    """Wherry's model runner, without scheduler and server."""

    def __init__(self, model: Decoder, tokens: int) -> None:
        blocks = -(-tokens // BLOCK_SIZE)
        device = model.storage.device
        stored = FORMATS[str(model.storage.dtype).removeprefix("torch.")]
        built = build(
            *(model, max(BATCHES) * blocks, BLOCK_SIZE, stored),
            native=False,
            threads=1,
            cuda=device.type == "cuda",
            max_decodes=max(BATCHES),
        )
        self._runner = ModelRunner(built)
        self._tables = [np.arange(i * blocks, (i + 1) * blocks, dtype=np.int32) for i in range(max(BATCHES))]

    def prefill(self, length: int) -> list[int]:
        return self._step([SequenceStep("0", [1] * length, 0, self._tables[0], True)])

    def decode(self, tokens: list[int], position: int) -> list[int]:
        return self._step([SequenceStep(str(i), [t], position, self._tables[i], True) for i, t in enumerate(tokens)])

    def _step(self, steps: list[SequenceStep]) -> list[int]:
        logits, _ = self._runner.logits(steps)
        tokens: list[int] = logits.argmax(dim=-1).tolist()
        return tokens


class Compiled:
    """The static loop. `compile_` is `torch.compile` with its settings."""

    def __init__(self, model: Decoder, length: int, compile_: Callable[..., Callable[..., torch.Tensor]]) -> None:
        config, storage = model.config, model.storage
        shape = (config.num_layers, 2, max(BATCHES), config.num_kv_heads, length, config.head_dim)
        self._model = model
        self._cache = torch.zeros(shape, dtype=storage.dtype, device=storage.device)
        cos, sin = (t[:length].to(storage.device, storage.dtype) for t in model.rope.tables())
        self._cos, self._sin = torch.cat((cos, cos), dim=-1), torch.cat((-sin, sin), dim=-1)
        self._places = torch.arange(length, device=storage.device)
        self._compiled = compile_(self.logits)

    def prefill(self, length: int) -> list[int]:
        return self._run(torch.ones(1, length, dtype=torch.int64), torch.arange(length))

    def decode(self, tokens: list[int], position: int) -> list[int]:
        return self._run(torch.tensor(tokens)[:, None], torch.tensor([position]))

    def _run(self, tokens: torch.Tensor, positions: torch.Tensor) -> list[int]:
        device = self._cache.device
        with torch.inference_mode():
            logits = self._compiled(tokens.to(device), positions.to(device))
            drawn: list[int] = logits.argmax(dim=-1).tolist()
        return drawn

    def logits(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """tokens [B, T] at positions [T] → [B, vocab_size] float32 after the last."""
        model, config = self._model, self._model.config
        mask = self._places[None, :] <= positions[:, None]
        cos, sin = self._cos[positions], self._sin[positions]
        x = functional.embedding(tokens, model.embedding.weight)
        for index, layer in enumerate(model.layers):
            qkv = functional.linear(_norm(x, layer.input_norm.weight, config), _weight(layer.qkv))
            heads = qkv.view(*tokens.shape, -1, config.head_dim).transpose(1, 2)
            query, key, value = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
            cache = self._cache[index, :, : tokens.shape[0]]
            cache[0].index_copy_(2, positions, _rotate(key, cos, sin))
            cache[1].index_copy_(2, positions, value)
            query = _rotate(query, cos, sin)
            attended = functional.scaled_dot_product_attention(
                query, cache[0], cache[1], attn_mask=mask, enable_gqa=True
            )
            x = x + functional.linear(attended.transpose(1, 2).flatten(2), _weight(layer.output))
            gate, up = functional.linear(_norm(x, layer.mlp_norm.weight, config), _weight(layer.gate_up)).chunk(2, -1)
            x = x + functional.linear(functional.silu(gate) * up, _weight(layer.down))
        return functional.linear(_norm(x[:, -1], model.norm.weight, config), _weight(model.head)).float()


def _norm(x: torch.Tensor, weight: torch.Tensor, config: ModelConfig) -> torch.Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, config.norm_eps)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def _weight(linear: Linear) -> torch.Tensor:
    if linear.weight is None:
        raise TypeError("the static loop takes plain matrices")
    return linear.weight


def read_bandwidth(device: torch.device, size: int = 4 << 30) -> float:
    """Bytes per second, the best of ten sums over memory that no cache holds."""
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = float("inf")
    for _ in range(10):
        torch.cuda.synchronize()
        began = time.perf_counter()
        float(data.sum())
        best = min(best, time.perf_counter() - began)
    return size / best


def decode_rate(engine: Ours | Compiled, batch: int, steps: int) -> float:
    """Tokens per second over `steps` steps of `batch` sequences."""
    tokens = [1] * batch
    for position in range(CONTEXT - 8, CONTEXT):
        tokens = engine.decode(tokens, position)
    began = time.perf_counter()
    for position in range(CONTEXT, CONTEXT + steps):
        tokens = engine.decode(tokens, position)
    return batch * steps / (time.perf_counter() - began)


def prefill_rate(engine: Ours | Compiled, length: int) -> float:
    engine.prefill(length)
    began = time.perf_counter()
    engine.prefill(length)
    return length / (time.perf_counter() - began)


def measure(rounds: int, steps: int, console: Console) -> tuple[float, list[Result]]:
    """The read bandwidth, and everybody's figures."""
    device = torch.device("cuda")
    bandwidth = read_bandwidth(device)
    length = max(PROMPT, CONTEXT + steps)
    weights: tuple[Quantization, ...] = ("none", "int8", "int4")
    models = {w: random_model(SHAPE_1_1B, device, w) for w in weights}
    engines: list[tuple[str, str, Ours | Compiled]] = []
    for w, model in models.items():
        engines.append(("Wherry", "bfloat16" if w == "none" else w, Ours(model, length)))
    console.print("compiling the static loop, which takes minutes")
    loop = Compiled(models["none"], length, lambda f: torch.compile(f, mode="reduce-overhead", fullgraph=True))
    engines.append(("torch.compile", "bfloat16", loop))
    rates: dict[tuple[str, str, str, int], list[float]] = {}
    for number in range(rounds + 1):
        console.print(f"round {number} of {rounds}" + (", not counted" if not number else ""))
        for engine, name, runner in engines:
            found = {("decode", batch): decode_rate(runner, batch, steps) for batch in BATCHES}
            found["prefill", 1] = prefill_rate(runner, PROMPT)
            for (what, batch), rate in found.items():
                if number:
                    rates.setdefault((engine, name, what, batch), []).append(rate)
        gc.collect()
    results = []
    for (engine, name, what, batch), found_rates in rates.items():
        rate, share = statistics.median(found_rates), None
        if what == "decode":
            read = step_bytes(models["none" if name == "bfloat16" else name], batch, CONTEXT + steps // 2)  # type: ignore[index]
            share = read * rate / batch / bandwidth
        results.append(Result(engine, name, what, batch, rate, share))
    return bandwidth, results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=64, help="decode steps in a round")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    console = Console()
    reason = "there is none" if not torch.cuda.is_available() else unavailable(torch.device("cuda"))
    if reason is not None:
        console.print(f"This benchmark needs an NVIDIA GPU: {reason}. Nothing was measured.")
        return 0
    bandwidth, results = measure(args.rounds, args.steps, console)
    name = torch.cuda.get_device_name()
    table = Table("engine", "weights", "what", "batch", "tokens/s", "of read bandwidth", title=name)
    for r in results:
        share = "" if r.share is None else f"{r.share:.0%}"
        table.add_row(r.engine, r.weights, r.what, str(r.batch), f"{r.tokens_per_second:,.0f}", share)
    console.print(table, f"read bandwidth {bandwidth / 1e9:,.0f} GB/s, torch {torch.__version__}")
    if args.json:
        found = {
            "gpu": name,
            "torch": torch.__version__,
            "bandwidth": bandwidth,
            "results": [asdict(r) for r in results],
        }
        args.json.write_text(json.dumps(found, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
