"""Token ids of Wherry against their references: `python -m benchmarks.tokenizer_agreement [--characters 10000000]`.

Text made to be hard (`tests.runtime.formats.corpus`: code, CJK, emoji, spaces, control characters, any character at
all) in pieces of some hundred characters. The sample model's byte-level BPE from its tokenizer.json and from GGUF,
against `tokenizers` and llama.cpp; a SentencePiece model trained here from `tokenizer.model` and from GGUF, against
`sentencepiece` and llama.cpp, where that is installed (`python -m benchmarks.engine.peers llamacpp`).
"""

import argparse
import json
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import tokenizers
from benchmarks.engine.peers import installed, python
from tests.runtime.formats.corpus import corpus
from tests.runtime.formats.test_tokenizers import LLAMA, as_gguf, train, without_original

from wherry_runtime.tokenization.to_gguf import tokenizer_metadata
from wherry_runtime.tokenization.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "examples" / "models" / "tiny"
Ids = list[list[int]]
# Markup is matched in text by some and not by others, which is a choice and not a difference.
MARKUP = ("<s>", "</s>", "<unk>", "<|im_", "<|endoftext|>", "[INST]", "<0x")


def llama_cpp(file: Path, texts: list[str]) -> Ids:
    job = {"file": str(file), "prompts": [], "new_tokens": 0, "texts": texts}
    command = [python("llamacpp"), ROOT / "benchmarks" / "gguf_peer.py"]
    done = subprocess.run(command, input=json.dumps(job), capture_output=True, text=True, check=True)
    ids: Ids = json.loads(done.stdout)["ids"]
    return ids


def row(what: str, reference: str, ours: Ids, theirs: Ids) -> None:
    same = sum(a == b for a, b in zip(ours, theirs, strict=True))
    print(f"| {what} | {reference} | {same:,} of {len(ours):,} | {sum(map(len, ours)):,} |", flush=True)


def compare(
    directory: Path, model: Path, texts: list[str], what: str, name: str, reference: Callable[[str], list[int]]
):
    """The rows of one tokenizer."""
    vocab_size = Tokenizer(model).vocab_size
    gguf = as_gguf(directory / f"{what}.gguf", without_original(tokenizer_metadata(model, {"vocab_size": vocab_size})))
    ours, theirs = Tokenizer(model), [reference(t) for t in texts]
    row(what, name, [ours.encode(t, special_tokens=False) for t in texts], theirs)
    read = Tokenizer(gguf)
    ids = [read.encode(t, special_tokens=False) for t in texts]
    row(f"{what} through GGUF", name, ids, theirs)
    if installed("llamacpp"):
        row(f"{what} through GGUF", "llama.cpp", ids, llama_cpp(gguf, texts))


def main(characters: int) -> None:
    texts = [t for t in corpus(characters, seed=3) if not any(m in t for m in MARKUP)]
    print(f"{sum(len(t.encode()) for t in texts):,} bytes in {len(texts):,} texts\n")
    print("| tokenizer | against | texts with equal ids | tokens |")
    print("|---|---|---|---|")
    with tempfile.TemporaryDirectory() as directory:
        fast = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
        plain = Path(directory)
        compare(plain, TINY, texts, "BPE", "tokenizers", lambda t: fast.encode(t, add_special_tokens=False).ids)
        model = plain / "sentencepiece"
        model.mkdir()
        processor = train(model, **LLAMA)
        compare(plain, model, texts, "SentencePiece", "sentencepiece", processor.encode)


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--characters", type=int, default=10_000_000)
    main(arguments.parse_args().characters)
