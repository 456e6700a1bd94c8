"""Which engines run with which formats, and what each of them loads."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine import models, peers

from wherry_cli.progress import step

# Memory that malloc gives out lies in transparent huge pages: weights are read faster than from pages of 4 KiB.
HUGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


@dataclass(frozen=True)
class Variant:
    """One way to run one engine."""

    engine: str  # also the module here that runs it
    name: str  # format, and after a `+` how the engine is run
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def format(self) -> str:
        """Of the weights."""
        return self.name.split("+")[0]

    @property
    def label(self) -> str:
        return f"{self.engine} {self.name}"


def weights(variant: Variant, model: str) -> Path:
    """What the engine loads."""
    if variant.engine == "llamacpp":
        return models.MODELS / f"{model}.gguf" / f"{variant.format}.gguf"
    if variant.engine == "openvino":
        return models.MODELS / f"{model}.openvino" / variant.format
    return models.make(model)


def _wherry() -> Iterator[Variant]:
    yield Variant("wherry", "bf16", {"dtype": "bfloat16"})
    for name in ("int8", "int4"):
        yield Variant("wherry", name, {"dtype": "bfloat16", "quantization": name})
    # No worse than what is compared with it (docs/performance/engine.md, quality), and less to read.
    yield Variant("wherry", "int4 g64", {"dtype": "bfloat16", "quantization": "int4", "quantization_group": 64})


def every() -> list[Variant]:
    """All of them, Wherry first; those whose peer is not installed are left out."""
    found = list(_wherry())
    found += [Variant("llamacpp", name) for name in ("bf16", "q8_0", "q4_0", "q4_k_m")]
    found += [Variant("openvino", f"{name}+{how}") for name in ("int8", "int4") for how in ("cb", "plain")]
    found.append(Variant("transformers", "bf16"))
    return [v for v in found if peers.installed(v.engine)]


def environment(*, huge_pages: bool = True) -> dict[str, str]:
    """For every engine's process."""
    pages = HUGE_PAGES if huge_pages else {}
    return {**os.environ, **pages, "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}


def export(directory: Path, target: Path, format_: str) -> None:
    """An OpenVINO model by OpenVINO's own converter, weights compressed with its defaults (int8 per channel; int4 in
    groups of 128, asymmetric, embedding and head in int8)."""
    command = [peers.python("openvino").parent / "optimum-cli", "export", "openvino", "--model", directory]
    command += ["--task", "text-generation-with-past", "--weight-format", format_, target]
    if format_ == "int4":  # where a width is no multiple of 128, smaller groups
        command += ["--group-size-fallback", "adjust"]
    log = target.with_suffix(".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as out:
        subprocess.run([str(c) for c in command], check=True, stdout=out, stderr=out, env=environment())


def prepare(model: str, wanted: list[Variant]) -> None:
    """Makes whatever checkpoint or converted file is missing."""
    with step(f"Checkpoint {model}"):
        directory = models.make(model)
    root = models.ROOT
    if any(v.engine == "llamacpp" for v in wanted):
        with step(f"GGUF files of {model}"):
            out = models.MODELS / f"{model}.gguf"
            command = [peers.python("llamacpp"), "-m", "benchmarks.engine.gguf_files", directory, out]
            subprocess.run(command, check=True, cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    for variant in {v.format: v for v in wanted if v.engine == "openvino"}.values():
        target = weights(variant, model)
        if not (target / "openvino_detokenizer.xml").exists():
            with step(f"OpenVINO {variant.format} model of {model}"):
                export(directory, target, variant.format)


if __name__ == "__main__":
    for name in sys.argv[1:] or ["1.1b"]:
        prepare(name, every())
