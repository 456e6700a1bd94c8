"""Texts a second of an embedding model: Wherry beside transformers, on the same weights, texts and threads, in turns.

    python -m benchmarks.embeddings [--texts 256] [--rounds 5] [--threads 1] [--dtype float32] [--json FILE]

The model has MiniLM-L6's sizes and random weights: speed does not depend on what they are. Texts are pieces of the
sample text, of lengths drawn from a lognormal distribution (median 24 words), in random order. Every row
computes all of them anew in each round, and rounds take turns, so that a slow moment of the machine hits all rows.

- transformers: batches in the texts' order, padded to the longest of each, mean pooling, as its documentation shows.
- transformers, sorted: the texts sorted by length first, which is what sentence-transformers does.
- Wherry: batches of `--max-batched-tokens` tokens in the texts' order, without padding.
- Wherry, HTTP: `wherry serve` in a process of its own, asked by the `openai` client, eight requests of 16 at once.

The first three are given token ids, the last one tokenizes. All vectors are compared with those of transformers.
"""

import argparse
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import torch
import transformers
from rich.console import Console
from rich.table import Table
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.embedding.model import Embedder, load_embedder

TEXT = Path(__file__).resolve().parent / "data" / "dev.txt"
BATCH = 32  # texts, as sentence-transformers' default
Vectors = npt.NDArray[np.float32]


def texts(count: int) -> list[str]:
    """Pieces of the sample text."""
    draw = random.Random(3)
    words = TEXT.read_text().split()
    lengths = [min(max(int(draw.lognormvariate(3.2, 0.9)), 2), 200) for _ in range(count)]
    return [" ".join(words[start : start + length]) for length in lengths for start in [draw.randrange(len(words))]]


def build(directory: Path) -> transformers.BertModel:
    """A checkpoint with MiniLM-L6's sizes, and a WordPiece tokenizer trained on the text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    tokenizer.train([str(TEXT)], trainers.WordPieceTrainer(vocab_size=8000, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer.save(str(directory / "tokenizer.json"))
    config = transformers.BertConfig(
        vocab_size=30522,
        hidden_size=384,
        num_hidden_layers=6,
        num_attention_heads=12,
        intermediate_size=1536,
        initializer_range=0.05,
    )
    torch.manual_seed(1)
    model = transformers.BertModel(config).eval()
    model.save_pretrained(directory)
    return model


def by_transformers(model: transformers.BertModel, given: list[list[int]], *, ordered: bool) -> Vectors:
    """Vectors of all texts, in batches."""
    order = sorted(range(len(given)), key=lambda i: -len(given[i])) if ordered else list(range(len(given)))
    found = np.empty((len(given), model.config.hidden_size), dtype=np.float32)
    for start in range(0, len(order), BATCH):
        places = order[start : start + BATCH]
        longest = max(len(given[i]) for i in places)
        ids = torch.tensor([given[i] + [0] * (longest - len(given[i])) for i in places])
        mask = torch.tensor([[1] * len(given[i]) + [0] * (longest - len(given[i])) for i in places])
        with torch.inference_mode():
            rows = model(input_ids=ids, attention_mask=mask).last_hidden_state
            weight = mask.unsqueeze(-1).to(rows.dtype)
            pooled = torch.nn.functional.normalize((rows * weight).sum(1) / weight.sum(1), dim=-1)
        found[places] = pooled.float().numpy()
    return found


def by_wherry(embedder: Embedder, given: list[list[int]], max_tokens: int) -> Vectors:
    """The same by the engine's model, batched as its queue does for one client."""
    told: list[bytes | None] = []
    batch: list[list[int]] = []
    for text in [*given, None]:
        if text is None or (batch and sum(map(len, batch)) + len(text) > max_tokens):
            told += embedder.embed(batch, [None] * len(batch))
            batch = []
        if text is not None:
            batch.append(text)
    return np.stack([np.frombuffer(one or b"", "<f4") for one in told])


@contextmanager
def serving(directory: Path, args: argparse.Namespace) -> Iterator[str]:
    """`wherry serve`: its URL."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = ["--port", str(port), "--model-name", "e", "--threads", str(args.threads), "--dtype", args.dtype]
    settings += ["--max-batched-tokens", str(args.max_batched_tokens)]
    command = [sys.executable, "-m", "wherry_cli.main", "serve", str(directory), *settings]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.DEVNULL) as process:
        try:
            url = f"http://127.0.0.1:{port}"
            while not _ready(url):
                if process.poll() is not None:
                    raise SystemExit("wherry serve ended")
                time.sleep(0.1)
            yield url
        finally:
            process.terminate()


def _ready(url: str) -> bool:
    try:
        return httpx.get(url + "/readyz").status_code == 200
    except httpx.TransportError:
        return False


def by_http(client: openai.OpenAI, given: list[str]) -> Vectors:
    """Through the API."""
    parts = [given[start : start + 16] for start in range(0, len(given), 16)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda part: client.embeddings.create(model="e", input=part), parts))
    return np.array([one.embedding for answer in answers for one in answer.data], dtype=np.float32)


def measure(rows: dict[str, Callable[[], Vectors]], rounds: int) -> dict[str, dict[str, Any]]:
    """Seconds of each row by round, after one that warms up, and how far its vectors are from the first row's."""
    reference = next(iter(rows.values()))()
    found: dict[str, dict[str, Any]] = {}
    for name, compute in rows.items():
        found[name] = {"seconds": [], "cosine": float((compute() * reference).sum(1).min())}
    for _ in range(rounds):
        for name, compute in rows.items():
            began = time.perf_counter()
            compute()
            found[name]["seconds"].append(time.perf_counter() - began)
    return found


def main() -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--max-batched-tokens", type=int, default=2048)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    given = texts(args.texts)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary)
        model = build(directory).to(getattr(torch, args.dtype))
        config = EngineConfig(model_name="e", model_uri=temporary, dtype=args.dtype, threads=args.threads)
        embedder = load_embedder(config)
        tokens = [embedder.encode(text, embedder.max_length) for text in given]
        with serving(directory, args) as url, openai.OpenAI(base_url=url + "/v1", api_key="none") as client:
            rows: dict[str, Callable[[], Vectors]] = {
                "transformers": lambda: by_transformers(model, tokens, ordered=False),
                "transformers, sorted": lambda: by_transformers(model, tokens, ordered=True),
                "Wherry": lambda: by_wherry(embedder, tokens, args.max_batched_tokens),
                "Wherry, HTTP": lambda: by_http(client, given),
            }
            found = measure(rows, args.rounds)
    report(found, tokens, args)


def report(found: dict[str, dict[str, Any]], tokens: list[list[int]], args: argparse.Namespace) -> None:
    """The table, and the JSON file where one is asked for."""
    total = sum(map(len, tokens))
    table = Table("", "texts/s", "tokens/s", "slowest round", "least cosine")
    for name, row in found.items():
        seconds = statistics.median(row["seconds"])
        slowest = len(tokens) / max(row["seconds"])
        cells = (f"{len(tokens) / seconds:.0f}", f"{total / seconds:.0f}", f"{slowest:.0f}", f"{row['cosine']:.6f}")
        table.add_row(name, *cells)
    lengths = sorted(map(len, tokens))
    Console().print(
        f"{len(tokens)} texts of {lengths[0]} to {lengths[-1]} tokens, median {lengths[len(lengths) // 2]}; "
        f"{args.threads} threads, {args.dtype}; medians of {args.rounds} rounds"
    )
    Console().print(table)
    if args.json:
        args.json.write_text(json.dumps({"settings": vars(args) | {"json": None}, "rows": found}, indent=1))


if __name__ == "__main__":
    main()
