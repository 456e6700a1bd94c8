"""GGUF files of the same model, in Wherry and in llama.cpp, on the same tokens.

llama.cpp runs in its own environment (`python -m benchmarks.engine.peers llamacpp`); its logits come back window by
window and are compared with the reference as all other rows' are. Its quantizer starts from Wherry's float32 file.
"""

import json
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import torch
from benchmarks.engine.peers import installed, python
from benchmarks.quantization.subjects import ROOT, subject

from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.gguf.types import type_named
from wherry_runtime.quality.measure import Scorer, Subject, add, compare
from wherry_runtime.quality.score import Score

OURS = ("Q8_0", "Q4_K", "Q4_0")
THEIRS = {"Q8_0": 7, "Q4_K_M": 15, "Q4_0": 2}  # `llama_ftype`
SCRIPT = ROOT / "benchmarks" / "quantization" / "llamacpp_peer.py"


def names() -> list[str]:
    theirs = [f"llama.cpp {name}" for name in THEIRS] if installed("llamacpp") else []
    return [f"GGUF {name}" for name in OURS] + theirs


def measure(name: str, model: Path, reference: Subject, windows: list[list[int]], length: int) -> dict[str, Any]:
    """One row."""
    program, kind = name.split()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "model.gguf")
        to_gguf(open_source(model), file, type_named(kind if program == "GGUF" else "F32"), lambda _: None)
        if program == "GGUF":
            score = compare(subject(file, length).scorer, reference.scorer, windows, lambda: None)
        else:
            quantized = Path(folder, "quantized.gguf")
            job = {"file": str(file), "target": str(quantized), "type": THEIRS[kind], "windows": windows}
            with logits(job, Path(folder)) as theirs:
                score = beside(theirs, reference.scorer, windows)
            file = quantized
        size = sum(t.read().nbytes for t in open_source(file).tensors if "_proj." in t.name)
        whole = 4 * sum(int(np.prod(t.shape)) for t in open_source(file).tensors if "_proj." in t.name)
    return {**msgspec.to_builtins(score.summary()), "layout": "", "file": size / whole}


@contextmanager
def logits(job: dict[str, Any], folder: Path) -> Iterator[Iterator[torch.Tensor]]:
    """llama.cpp's log-probabilities [length - 1, vocab_size] of each window."""
    task = folder / "job.json"
    task.write_text(json.dumps(job))
    with subprocess.Popen([python("llamacpp"), SCRIPT, task], stdout=subprocess.PIPE) as process:
        if process.stdout is None:
            raise RuntimeError("a process without output")
        stream = process.stdout
        vocab = int.from_bytes(stream.read(4), "little")

        def each() -> Iterator[torch.Tensor]:
            for window in job["windows"]:
                raw = stream.read(4 * vocab * (len(window) - 1))
                yield torch.from_numpy(np.frombuffer(raw, np.float32).reshape(-1, vocab).copy()).log_softmax(dim=-1)

        yield each()
    if process.returncode:
        raise RuntimeError(f"llama.cpp ended with {process.returncode}")


def beside(theirs: Iterator[torch.Tensor], reference: Scorer, windows: list[list[int]]) -> Score:
    score = Score()
    with torch.inference_mode():
        for window, found in zip(windows, theirs, strict=True):
            expected = torch.cat(list(reference.logprobs(window)))
            add(score, found, expected, window[1:])
    return score
