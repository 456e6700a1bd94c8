"""Every architecture that GGUF files are written of: the same greedy tokens in llama.cpp as here?

`python -m benchmarks.gguf_architectures`, after `python -m benchmarks.engine.peers llamacpp`. A small random model of
each, made by transformers, becomes a GGUF file in float32, and both continue the same prompts from it.
"""

import asyncio
import random
import sys
import tempfile
from pathlib import Path

from benchmarks.engine.peers import installed
from benchmarks.gguf_agreement import peer
from tests.runtime.engines import ask, running
from tests.runtime.formats.gguf_models import MODELS
from tests.runtime.random_models import Case

from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf

NEW_TOKENS, PROMPTS, LENGTH = 64, 8, 24


async def ours(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    async with running(file, backend="pytorch", threads=1) as engine:
        answers = [await ask(engine, p, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True) for p in prompts]
    return [a.ids for a in answers]


def row(case: Case, directory: Path) -> str:
    """A line of the table."""
    source, file = directory / "source", directory / "model.gguf"
    case.build(source)
    to_gguf(open_source(source), file, None, lambda _: None)
    draw = random.Random(3)
    prompts = [[draw.randrange(256) for _ in range(LENGTH)] for _ in range(PROMPTS)]
    mine, theirs = asyncio.run(ours(file, prompts)), peer(file, prompts, new_tokens=NEW_TOKENS)
    same = sum(x == y for a, b in zip(mine, theirs, strict=True) for x, y in zip(a, b, strict=True))
    return f"| {case.name} | {same} of {NEW_TOKENS * PROMPTS} |"


def main(names: list[str]) -> None:
    if not installed("llamacpp"):
        raise SystemExit("install llama.cpp first: python -m benchmarks.engine.peers llamacpp")
    print("| model | equal greedy tokens |\n|---|---|")
    for case in MODELS:
        if case.name in names or not (names or case.name == "bert"):
            with tempfile.TemporaryDirectory() as directory:
                print(row(case, Path(directory)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
