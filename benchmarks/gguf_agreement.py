"""The same GGUF file in llama.cpp and in Wherry: the same greedy tokens?

`python -m benchmarks.gguf_agreement [MODEL]`, after `python -m benchmarks.engine.peers llamacpp`. For each type MODEL
(by default examples/models/tiny) is converted, by Wherry or by llama.cpp; then both continue the same prompts greedily
from the same file. Wherry computes in float32. llama.cpp rounds activations to 8 bits where weights have a block type,
and to bfloat16 where they are that, so there tokens may part where two candidates are nearly equal. So it gets the file
once more after Wherry converted it to float32: then nothing but the values of the blocks is left to differ. The last
column is Wherry's native kernels, which compute with the blocks and round activations to 8 bits, too.
"""

import asyncio
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.engine.peers import installed, python
from tests.runtime.engines import BACKENDS, ask, running

from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.gguf.types import type_named
from wherry_runtime.tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TYPES = ["F32", "BF16", "F16", "Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0"]
NEW_TOKENS = 64
PART = 9_000_000  # bytes
PROMPTS = 8


# What llama.cpp's own quantizer makes of the float32 file (`llama_ftype`).
THEIRS = {"Q5_1": 9, "Q2_K": 10, "Q3_K_M": 12, "Q4_K_M": 15, "IQ4_NL": 25, "IQ4_XS": 30}


def peer(file: Path, prompts: list[list[int]], *, field: str = "answers", **more: object) -> Any:
    """What llama.cpp makes of them; `field` of its answer."""
    job = {"file": str(file), "prompts": prompts, "new_tokens": NEW_TOKENS, "texts": [], **more}
    command = [python("llamacpp"), ROOT / "benchmarks" / "gguf_peer.py"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
    return json.loads(done.stdout)[field]


async def ours(file: Path, prompts: list[list[int]], backend: str = "pytorch") -> list[list[int]]:
    """The same in Wherry, in float32; on the native kernels with int8 activations."""
    async with running(file, threads=1, **BACKENDS[backend]) as engine:
        answers = [await ask(engine, p, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True) for p in prompts]
    return [a.ids for a in answers]


def agreeing(a: list[int], b: list[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main(model: Path) -> None:
    if not installed("llamacpp"):
        raise SystemExit("install llama.cpp first: python -m benchmarks.engine.peers llamacpp")
    text = (ROOT / "benchmarks" / "data" / "dev.txt").read_text()
    parts = [text[i * 3000 : i * 3000 + 160] for i in range(PROMPTS)]
    tokenizer = Tokenizer(model)
    prompts = [tokenizer.encode(part, special_tokens=False) for part in parts]
    print(
        "| type | written by | agree with llama.cpp (whole prompts) | with llama.cpp in float32 | with native kernels |"
    )
    print("|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        for name in TYPES:
            file = Path(directory) / f"{name}.gguf"
            to_gguf(open_source(model), file, type_named(name), lambda _: None)
            row(name, "Wherry", file, prompts, peer(file, prompts))
        to_gguf(open_source(model), Path(directory) / "parts" / "p.gguf", type_named("F32"), lambda _: None, PART)
        first = min((Path(directory) / "parts").iterdir())
        row("F32 in several files", "Wherry", first, prompts, peer(first, prompts))
        for name, file_type in THEIRS.items():
            file = Path(directory) / f"theirs-{name}.gguf"
            theirs = peer(Path(directory) / "F32.gguf", prompts, quantize=[str(file), file_type])
            row(name, "llama.cpp", file, prompts, theirs)


def row(name: str, writer: str, file: Path, prompts: list[list[int]], theirs: list[list[int]]) -> None:
    """A line of the table about one file."""
    plain = file.with_suffix(".float")
    to_gguf(open_source(file), plain, type_named("F32"), lambda _: None)
    mine = asyncio.run(ours(file, prompts))
    blocks = asyncio.run(ours(file, prompts, "native"))
    columns = (told(mine, theirs), told(mine, peer(plain, prompts)), told(mine, blocks))
    print(f"| {name} | {writer} | {' | '.join(columns)} |", flush=True)


def told(mine: list[list[int]], theirs: list[list[int]]) -> str:
    same = [agreeing(a, b) for a, b in zip(mine, theirs, strict=True)]
    return f"{sum(same)} of {NEW_TOKENS * PROMPTS} ({sum(s == NEW_TOKENS for s in same)} of {PROMPTS})"


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "examples" / "models" / "tiny")
