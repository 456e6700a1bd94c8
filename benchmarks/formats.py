"""What formats of weights and of the KV cache cost in quality: the tables of docs/performance/{weights,kv-cache}.md.

    python -m benchmarks.formats [--windows 24] [--length 1024] [--json FILE]

The sample model, trained, on held-out text (`benchmarks/data`): random weights have no quality to lose. The reference
is the engine itself with weights and KV cache in float32. Formats of weights run with the cache in float32, and formats
of the cache with weights in float32, so that nothing else is in a row's figures. Every position is computed as decoding
computes it: its key and value are written to the cache, and all keys and values are read from there.
"""

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch
from rich.console import Console
from rich.progress import track

from wherry_protocol.engine_config import Quantization
from wherry_runtime.engine.backend import build
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.kvcache.paged import bytes_per_token
from wherry_runtime.layers.linear import Linear
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.models.registry import read_config
from wherry_runtime.quality.measure import Scorer, add
from wherry_runtime.quality.score import Score
from wherry_runtime.quantization.formats import Format
from wherry_runtime.quantization.storage import Role, Storage
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "examples" / "models" / "tiny"
TEXT = ROOT / "benchmarks" / "data" / "dev.txt"
BLOCK_SIZE = 16
INT4, INT8 = Format("int4", 32), Format("int8", 128)


@dataclass(frozen=True)
class Trial(Storage):
    """int4 with a choice of its own of what is finer. Roles with `first ` are those of the first layer."""

    finer: tuple[str, ...] = ()

    def format(self, role: Role, *, first_layer: bool = False) -> Format | None:
        return INT8 if role in self.finer or (first_layer and f"first {role}" in self.finer) else INT4


@dataclass(frozen=True)
class Variant:
    """A model in some formats."""

    name: str
    storage: Storage
    cache: str = "float32"
    weights_only: bool = False  # activations in float32


def storage(dtype: torch.dtype, quantization: Quantization = "none", group: int = 0) -> Storage:
    return Storage(dtype, torch.device("cpu"), quantization, group, native=True)


def trial(*finer: str) -> Storage:
    return Trial(torch.bfloat16, torch.device("cpu"), "int4", 32, native=True, finer=finer)


def weight_variants() -> list[Variant]:
    quantized: list[tuple[Quantization, int]] = [(m, g) for m in ("int8", "int4") for g in (128, 64, 32)]
    return [
        Variant("bfloat16", storage(torch.bfloat16)),
        *(Variant(f"{method}, groups of {g}", storage(torch.bfloat16, method, g)) for method, g in quantized),
    ]


def trial_variants() -> list[Variant]:
    head, attention = ("head",), ("first qkv", "first output")
    every = ("qkv", "output", "gate_up", "down")
    return [
        Variant("int4 everywhere", trial()),
        Variant("+ head in int8", trial(*head)),
        Variant("+ first layer's attention in int8 (the default)", trial(*head, *attention)),
        Variant("+ first layer's MLP in int8", trial(*head, *(f"first {r}" for r in every))),
        Variant("default + every down_proj in int8", trial(*head, *attention, "down")),
        Variant("default + every attention in int8", trial(*head, "qkv", "output")),
        Variant("default, activations in float32", trial(*head, *attention), weights_only=True),
        Variant("int8, activations in float32", storage(torch.bfloat16, "int8", 128), weights_only=True),
    ]


def cache_variants() -> list[Variant]:
    whole = storage(torch.float32)
    return [Variant(name, whole, name) for name in ("float32", "bfloat16", "fp8", "int8")]


def linears(model: Decoder) -> Iterator[Linear]:
    return (part for part in model.parts() if isinstance(part, Linear))


class Runner:
    """A loaded variant."""

    def __init__(self, variant: Variant, config: ModelConfig, length: int, threads: int) -> None:
        model = load_model(MODEL, config, length, variant.storage)
        matrices = [m for linear in linears(model) if (m := linear.packed) is not None]
        sizes = [m.num_outputs * m.num_inputs for m in matrices]
        bits = sum(m.format.bits_per_weight * size for m, size in zip(matrices, sizes, strict=True)) / sum(sizes)
        if variant.weights_only:
            model = unrounded_activations(model, config, length)
        stored = FORMATS[variant.cache]
        blocks = -(-length // BLOCK_SIZE)
        runner = ModelRunner(build(model, blocks, BLOCK_SIZE, stored, native=True, threads=threads))
        self._scorer = Scorer(runner, length, config.vocab_size)
        self._sizes = {"bits": bits, "bytes_per_token": bytes_per_token(config, stored, native=True)}
        self._score = Score()

    def logprobs(self, window: list[int]) -> torch.Tensor:
        """[len(window) - 1, vocab_size] float32."""
        return torch.cat(list(self._scorer.logprobs(window)))

    def add(self, window: list[int], reference: torch.Tensor) -> None:
        add(self._score, self.logprobs(window), reference, window[1:])

    def summary(self) -> dict[str, float]:
        return {**self._sizes, **msgspec.to_builtins(self._score.summary())}


def unrounded_activations(model: Decoder, config: ModelConfig, length: int) -> Decoder:
    """The model's rounded weights, held in float32: products then leave activations as they are."""
    wide = load_model(MODEL, config, length, storage(torch.float32))
    for to, source in zip(linears(wide), linears(model), strict=True):
        if to.packed is not None and source.packed is not None:
            to.packed.fill(0, source.packed.dequantized())
    return wide


def table(rows: dict[str, dict[str, float]], first: str, column: str, digits: int) -> str:
    """Markdown; `column` is the size to show."""
    unit = "bits" if column == "bits" else "bytes per token"
    lines = [
        f"| {first} | {unit} | perplexity | against float32 | agreement | divergence |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        change = f"{row['change']:+.3%} ± {row['error']:.3%}"
        size = f"{row[column]:,.{digits}f}"
        figures = [
            name,
            size,
            f"{row['perplexity']:.3f}",
            change,
            f"{row['agreement']:.2%}",
            f"{row['divergence']:.6f}",
        ]
        lines.append(f"| {' | '.join(figures)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=24)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    config = read_config(MODEL)
    chosen = windows(TEXT, Tokenizer(MODEL), args.windows, args.length)
    groups = {"weights": weight_variants(), "trials": trial_variants(), "cache": cache_variants()}
    reference = Runner(Variant("float32", storage(torch.float32)), config, args.length, args.threads)
    found: dict[str, dict[str, dict[str, float]]] = {name: {} for name in groups}
    with torch.inference_mode():
        known = []
        for window in track(chosen, "reference"):
            known.append(reference.logprobs(window))
        for group, variants in groups.items():
            for variant in variants:
                runner = Runner(variant, config, args.length, args.threads)
                for window, expected in track(list(zip(chosen, known, strict=True)), f"{group}: {variant.name}"):
                    runner.add(window, expected)
                found[group][variant.name] = runner.summary()
    console = Console(width=200)
    console.print(f"{sum(map(len, chosen))} tokens in windows of {args.length}\n")
    for group, first, column, digits in (
        ("weights", "weights", "bits", 2),
        ("trials", "int4 in groups of 32", "bits", 2),
        ("cache", "KV cache", "bytes_per_token", 0),
    ):
        console.print(table(found[group], first, column, digits) + "\n", markup=False, soft_wrap=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
