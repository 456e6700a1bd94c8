"""What activations with outliers cost, and what keeping them apart or scaling them away is worth.

The sample model has none to speak of, so it is given some: one channel in every 128 of what each norm makes is
multiplied by a factor, and the weights that read it are divided by it. The factor is a power of two: no result changes.
"""

import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.quantization.methods import Measurer
from benchmarks.quantization.subjects import DATA, MODELS, table
from safetensors import safe_open
from safetensors.torch import save_file

from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

FACTORS = (1, 16, 64)
METHODS = ("int8", "smoothquant", "llm-int8", "gptq int4 g128", "awq int4 g128", "awq-gptq int4 g128")
EVERY, FIRST = 128, 5  # channels: one in each group that shares a scale in the kernels
READERS = {
    "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
}
WINDOWS, LENGTH, CALIBRATION = 8, 1024, 32


def with_outliers(source: Path, target: Path, factor: int) -> None:
    """Writes a copy of a Llama in one file whose norms make outliers, and whose answers are the same."""
    shutil.copytree(source, target)
    path = target / "model.safetensors"
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    for name, weight in tensors.items():
        layer, _, norm = name.removesuffix(".weight").rpartition(".")
        for reader in READERS.get(norm, ()):
            tensors[f"{layer}.{reader}.weight"][:, FIRST::EVERY] /= factor
        if norm in READERS:
            weight[FIRST::EVERY] *= factor
    save_file(tensors, path, metadata={"format": "pt"})


def run(found: dict[str, Any], done: Callable[[], None]) -> None:
    """Adds the divergence of each method on each model to `found`; what is there already is kept."""
    tokenizer = Tokenizer(MODELS / "tiny")
    text = windows(DATA / "dev.txt", tokenizer, WINDOWS, LENGTH)
    calibration = windows(DATA / "calibration.txt", tokenizer, CALIBRATION, 512)
    for factor in FACTORS:
        with tempfile.TemporaryDirectory() as folder:
            model = Path(folder, "model")
            with_outliers(MODELS / "tiny", model, factor)
            measurer = Measurer(model, text, calibration, 1)
            for method in METHODS:
                if (case := f"{factor}; {method}") not in found:
                    row = measurer.measure(method)
                    found[case] = [row["divergence"], row["change"], row["agreement"]]
                    done()


def report(found: dict[str, Any]) -> str:
    """A line for each method and factor."""
    lines = []
    for case, (divergence, change, agreement) in found.items():
        factor, method = case.split("; ")
        lines.append([f"× {factor}", method, f"{change:+.3%}", f"{agreement:.2%}", f"{divergence:.6f}"])
    return table(["outliers", "method", "change", "agreement", "KL"], lines)
