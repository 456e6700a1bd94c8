"""Every architecture that GGUF files are written of: the same greedy tokens in llama.cpp as here?

`python -m benchmarks.gguf_architectures`, after `python -m benchmarks.engine.peers llamacpp`. A small random model of
each, made by transformers, becomes a GGUF file in float32, and both continue the same prompts from it. Of BERT, which
continues nothing, both make vectors of the same texts. GPT-OSS comes with experts in MXFP4, too: llama.cpp, which
rounds what it multiplies with these to 8 bits, gets that file converted to float32.
"""

import asyncio
import random
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from benchmarks.engine.peers import installed
from benchmarks.gguf_agreement import peer
from tests.runtime.encoders import BERT, save_modules
from tests.runtime.engines import ask, running
from tests.runtime.formats.corpus import corpus
from tests.runtime.formats.gguf_models import MODELS, published
from tests.runtime.random_models import Case

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.embedding.model import load_embedder
from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.gguf.types import type_named

NEW_TOKENS, PROMPTS, LENGTH = 64, 8, 24
MXFP4 = replace(next(case for case in MODELS if case.name == "gpt-oss-without-yarn"), name="gpt-oss-mxfp4")


async def ours(file: Path, prompts: list[list[int]]) -> list[list[int]]:
    async with running(file, backend="pytorch", threads=1) as engine:
        answers = [await ask(engine, p, max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True) for p in prompts]
    return [a.ids for a in answers]


def row(case: Case, directory: Path) -> str:
    """A line of the table."""
    source, file, plain = (directory / name for name in ("source", "model.gguf", "plain.gguf"))
    if packed := case.name == MXFP4.name:
        published(case, source)
    else:
        case.build(source)
    to_gguf(open_source(source), file, None, lambda _: None)
    if packed:
        to_gguf(open_source(file), plain, type_named("F32"), lambda _: None)
    draw = random.Random(3)
    prompts = [[draw.randrange(256) for _ in range(LENGTH)] for _ in range(PROMPTS)]
    theirs = peer(plain if packed else file, prompts, new_tokens=NEW_TOKENS)
    mine = asyncio.run(ours(file, prompts))
    same = sum(x == y for a, b in zip(mine, theirs, strict=True) for x, y in zip(a, b, strict=True))
    return f"| {case.name} | {same} of {NEW_TOKENS * PROMPTS} |"


def encoder_row(directory: Path) -> str:
    """The same of BERT: the least cosine between two vectors of a text, and how many texts have the same tokens."""
    source, file = directory / "source", directory / "model.gguf"
    BERT.build(source)
    save_modules(source)
    to_gguf(open_source(source), file, None, lambda _: None)
    embedder = load_embedder(EngineConfig(model_name="bert", model_uri=str(file), dtype="float32", threads=1))
    texts = corpus(20_000)
    ids = [embedder.encode(text) for text in texts]
    found: list[list[int]] = peer(file, [], texts=texts, field="ids")
    short = [tokens[: embedder.max_length] for tokens in ids[:PROMPTS]]
    theirs = np.array(peer(file, short, embed=True))
    mine = np.stack([np.frombuffer(v or b"", np.float32) for v in embedder.embed(short, [None] * len(short))])
    cosines = (mine * theirs).sum(axis=1) / np.linalg.norm(theirs, axis=1)
    same = sum(a == [tokens[0], *b, tokens[-1]] for a, b, tokens in zip(ids, found, ids, strict=True))
    return f"| bert | cosine {cosines.min():.6f} at least; {same} of {len(texts)} texts have the same tokens |"


def main(names: list[str]) -> None:
    if not installed("llamacpp"):
        raise SystemExit("install llama.cpp first: python -m benchmarks.engine.peers llamacpp")
    print("| model | equal greedy tokens |\n|---|---|")
    for case in (*MODELS, MXFP4):
        if not names or case.name in names:
            with tempfile.TemporaryDirectory() as directory:
                path = Path(directory)
                print(encoder_row(path) if case.name == "bert" else row(case, path), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
