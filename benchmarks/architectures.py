"""Decoding with other architectures than Llama's on a CPU: Wherry's native kernels, PyTorch in Wherry, transformers.

    python -m benchmarks.architectures [NAME…] [--rounds 3] [--quantization int8]

Random weights in bfloat16, in the shapes of small models of each family with as many layers as make some hundred
million weights, and 32,000 tokens. All three engines are resident and take turns. A rate is that of the median step:
one answer at a time, and eight.
"""

import argparse
import shutil
import statistics
from pathlib import Path
from typing import Any

import torch
import transformers
from benchmarks.engine import models
from benchmarks.engine.process import EngineProcess
from benchmarks.engine.workload import Job

VOCABULARY = 32000
BATCHES = (1, 8)
ENGINES = {"native": ("wherry", "native"), "PyTorch": ("wherry", "pytorch"), "transformers": ("transformers", "")}


def sizes(hidden: int, inner: int, layers: int, heads: int, kv_heads: int | None = None, **more: Any) -> dict[str, Any]:
    """As most configurations call them."""
    shape = {"hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    return {**shape, "num_attention_heads": heads, "num_key_value_heads": kv_heads or heads, **more}


def gpt(hidden: int, layers: int, heads: int) -> dict[str, Any]:
    """As GPT-2 and BLOOM call them."""
    return {"n_embd": hidden, "hidden_size": hidden, "n_layer": layers, "n_head": heads}


SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma 2 (2B, 6 layers)": ("Gemma2", sizes(2304, 9216, 6, 8, 4, head_dim=256)),
    "Gemma 3 (1B, 13 layers)": ("Gemma3Text", sizes(1152, 6912, 13, 4, 1, head_dim=256)),
    "GPT-2 (medium)": ("GPT2", gpt(1024, 24, 16)),
    "Pythia (410M)": ("GPTNeoX", sizes(1024, 4096, 24, 16)),
    "BLOOM (560M)": ("Bloom", gpt(1024, 24, 16)),
    "Phi-2 (4 layers)": ("Phi", sizes(2560, 10240, 4, 32)),
    "Granite (2B, 6 layers)": ("Granite", sizes(2048, 8192, 6, 32, 8, residual_multiplier=0.22)),
    "StableLM 2 (1.6B, 8 layers)": ("StableLm", sizes(2048, 5632, 8, 32)),
    "OLMo 2 (1B, 5 layers)": ("Olmo2", sizes(2048, 8192, 5, 16)),
}


def make(name: str) -> Path:
    """The checkpoint, made if it is not there."""
    kind, settings = SHAPES[name]
    directory = models.MODELS / f"architectures-{kind}"
    done = directory / "tokenizer.json"  # written last
    if not done.exists():
        config = getattr(transformers, f"{kind}Config")(
            vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **settings
        )
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        model.save_pretrained(directory)
        models.write_tokenizer(directory, VOCABULARY)
    return directory


def rates(name: str, rounds: int, quantization: str) -> dict[str, list[float]]:
    """Tokens a second of each engine, by batch."""
    directory = str(make(name))
    running = {}
    for label, (engine, backend) in ENGINES.items():
        options = {"dtype": "bfloat16"}
        if engine == "wherry":
            options |= {"backend": backend, "quantization": quantization}
        job = Job(engine, label, directory, directory, VOCABULARY, batches=BATCHES, options=options)
        running[label] = EngineProcess(job)
    seen: dict[str, list[list[float]]] = {label: [[] for _ in BATCHES] for label in running}
    for number in range(rounds):
        for label, process in running.items():
            for place, batch in enumerate(BATCHES):
                seen[label][place].append(process.ask(kind="decode", size=batch, number=number)["rate"])
    for process in running.values():
        process.close()
    return {label: [statistics.median(found) for found in by_batch] for label, by_batch in seen.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help="models whose name begins so; all by default")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--quantization", default="none", choices=("none", "int8", "int4"), help="of Wherry's")
    parser.add_argument("--remove", action="store_true", help="checkpoints that were made, when they are measured")
    args = parser.parse_args()
    heads = [f"{label}, {batch}" for batch in BATCHES for label in ENGINES]
    print(f"| tokens/s | {' | '.join(heads)} | native beside PyTorch | beside transformers |")
    print(f"|---{'|---' * len(heads)}|---|---|")
    for name in SHAPES:
        if args.names and not name.startswith(tuple(args.names)):
            continue
        found = rates(name, args.rounds, args.quantization)
        cells = [f"{found[label][place]:.1f}" for place in range(len(BATCHES)) for label in ENGINES]
        ratios = [
            ", ".join(f"{a / b:.1f}×" for a, b in zip(found["native"], found[other], strict=True))
            for other in ("PyTorch", "transformers")
        ]
        print(f"| {name} | {' | '.join(cells)} | {' | '.join(ratios)} |", flush=True)
        if args.remove:
            shutil.rmtree(make(name))


if __name__ == "__main__":
    main()
