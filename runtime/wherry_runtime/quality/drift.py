"""What a model loses by being rounded as it is loaded: `python -m wherry_runtime.quality.drift DIRECTORY int4`.

The model and its rounded twin see the same short text, side by side and a layer at a time, so that no more is held
than the embedding and a layer of each. Products with rounded weights are computed as the kernels compute them,
activations in int8 included, in PyTorch. A worker runs this in a process of its own, once it is ready.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from wherry_protocol.engine_config import Quantization
from wherry_runtime.calibration.walk import Walk
from wherry_runtime.engine.resources import available_memory
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import DTYPES, AnyDecoder, empty_model
from wherry_runtime.models.registry import read_config
from wherry_runtime.quality.measure import add
from wherry_runtime.quality.score import Score, Summary
from wherry_runtime.quality.text import TEXT
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.tokenization.tokenizer import Tokenizer

LENGTH = 256  # tokens of the text that are looked at
MOST_PARAMETERS = 4_000_000_000  # more take a core for longer than a worker's start should
HEAD_ROWS = 8192  # of a head that is not rounded, which are widened to float32 at once


@dataclass(frozen=True)
class Measured:
    """A model, and how it is rounded."""

    directory: Path
    quantization: Quantization
    group: int = 0


def measure(what: Measured, memory: int, length: int = LENGTH) -> Summary:
    """The rounded model beside the one it was made from.

    Args:
        memory: bytes that it may take.

    Raises:
        ModelError: not_measured, with the reason: it cannot be walked through layer by layer, it is too large, or
            memory is short.
    """
    config = read_config(what.directory)
    if config.encoder or what.directory.suffix == ".gguf":
        raise ModelError("not_measured", f"{config.architecture} is not measured layer by layer")
    held = DTYPES[config.dtype]
    outline = empty_model(config, 1, Storage(held, torch.device("meta")))
    if (count := outline.num_parameters()) > MOST_PARAMETERS:
        raise ModelError("not_measured", f"{count / 1e9:.1f} billion weights are more than are measured in passing")
    if memory < (needed := _bytes_needed(outline, held)):
        raise ModelError("not_measured", f"{needed >> 20} MiB of memory are needed and {memory >> 20} MiB are free")
    tokens = Tokenizer(what.directory).encode(TEXT)[:length]
    plain, rounded = Walk(what.directory, len(tokens)), Walk(what.directory, len(tokens), what.quantization, what.group)
    score = Score()
    with torch.inference_mode():
        x, y = plain.start(tokens), rounded.start(tokens)
        for index in range(plain.num_layers):
            x, y = plain.read_through(index, x), rounded.read_through(index, y)
        expected, found = (w.logits(v, HEAD_ROWS)[:-1].log_softmax(dim=-1) for w, v in ((plain, x), (rounded, y)))
        add(score, found, expected, tokens[1:])
    return score.summary()


def _bytes_needed(model: AnyDecoder, held: torch.dtype) -> int:
    """Two embeddings and heads, a layer of each with what rounding it takes, and a margin."""
    layer = max(sum(t.numel() for part in layer.parts() for t in part.state().values()) for layer in model.layers)
    ends = sum(t.numel() for part in (model.embedding, model.head) for t in part.state().values())
    return 2 * ends * held.itemsize + 16 * layer + (512 << 20)


def main() -> None:
    """Prints the summary, or why there is none, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", type=Path)
    parser.add_argument("quantization", choices=["int8", "int4"])
    parser.add_argument("--group", type=int, default=0)
    parser.add_argument("--memory", type=int, default=None, help="bytes that it may take")
    args = parser.parse_args()
    torch.set_num_threads(1)  # what else runs here answers requests
    try:
        memory = available_memory() if args.memory is None else args.memory
        found = measure(Measured(args.directory, args.quantization, args.group), memory)
    except ModelError as error:
        sys.stdout.write(json.dumps({"error": error.message}))
        return
    sys.stdout.write(json.dumps({"divergence": found.divergence, "change": found.change, "tokens": found.positions}))


if __name__ == "__main__":
    main()
