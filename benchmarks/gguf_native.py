"""A GGUF file computed with as it is, by Wherry and by llama.cpp: decoding speed and memory.

`python -m benchmarks.gguf_native [WEIGHTS…]`, after `python -m benchmarks.engine.peers llamacpp`. A random Llama of 8
layers of the 1.1b shape becomes GGUF, and that each type by llama.cpp's own quantizer. Both engines load the same file
and take turns. Beside them are Wherry's own int8 and int4 of the same checkpoint, and PyTorch: around the native
kernels' products, as for architectures that these do not know, and alone in bfloat16. Memory is what the process holds
after decoding: anonymous pages (weights, KV cache, buffers, and with Wherry the interpreter and PyTorch).
"""

import statistics
import sys
from pathlib import Path

from benchmarks.engine import models
from benchmarks.engine.peers import installed
from benchmarks.engine.process import EngineProcess
from benchmarks.engine.workload import Job
from benchmarks.gguf_agreement import peer

from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf

NAME = "8-layers"
TYPES = {"Q8_0": 7, "Q4_0": 2, "Q4_K_M": 15}  # llama_ftype
BATCHES = (1, 8)
ROUNDS = 3
OWN = ("int8", "int4")


def files() -> dict[str, Path]:
    """The checkpoint's GGUF files by type, made if they are not there."""
    models.SHAPES[NAME] = {**models.SHAPES["1.1b"], "num_hidden_layers": 8}
    directory = models.make(NAME)
    out = models.MODELS / f"{NAME}.native"
    out.mkdir(exist_ok=True)
    whole = out / "BF16.gguf"
    if not whole.exists():
        to_gguf(open_source(directory), whole, None, lambda _: None)
    for name, number in TYPES.items():
        if not (out / f"{name}.gguf").exists():
            peer(whole, [], quantize=[str(out / f"{name}.gguf"), number])
    return {name: out / f"{name}.gguf" for name in TYPES}


def jobs() -> dict[tuple[str, str], Job]:
    """(file type, engine) → what to measure."""
    found, by_type = {}, files()
    checkpoint = models.MODELS / NAME
    size = models.vocab_size(checkpoint)

    def job(engine: str, variant: str, weights: Path, **settings: str) -> Job:
        options = {"dtype": "bfloat16", **settings} if engine == "wherry" else {}
        return Job(engine, variant, str(weights), str(weights), size, batches=BATCHES, options=options)

    for name, path in by_type.items():
        for engine in ("wherry", "llamacpp"):
            found[name, engine] = job(engine, name, path)
    for name in OWN:
        found[name, "wherry"] = job("wherry", name, checkpoint, quantization=name)
    for name, path in (("Q4_K_M on PyTorch", by_type["Q4_K_M"]), ("bf16 on PyTorch", checkpoint)):
        found[name, "wherry"] = job("wherry", name, path, backend="pytorch")
    return found


def main(names: list[str]) -> None:
    if not installed("llamacpp"):
        raise SystemExit("install llama.cpp first: python -m benchmarks.engine.peers llamacpp")
    wanted = {key: job for key, job in jobs().items() if not names or key[0] in names}
    running = {key: EngineProcess(job) for key, job in wanted.items()}
    rates: dict[tuple[str, str, int], list[float]] = {}
    held: dict[tuple[str, str], float] = {}
    for number in range(ROUNDS):
        for (name, engine), process in running.items():
            for batch in BATCHES:
                answer = process.ask(kind="decode", size=batch, number=number)
                rates.setdefault((name, engine, batch), []).append(answer["rate"])
                held[name, engine] = answer["memory"]["anonymous"] / 2**20
    for process in running.values():
        process.close()
    print("| weights | file | engine | memory | tokens/s, one answer | eight answers |")
    print("|---|---|---|---|---|---|")
    for name, engine in wanted:
        path = Path(wanted[name, engine].weights)
        size = f"{path.stat().st_size / 2**20:.0f} MiB" if path.is_file() else ""
        speeds = [f"{statistics.median(rates[name, engine, batch]):.1f}" for batch in BATCHES]
        print(f"| {name} | {size} | {engine} | {held[name, engine]:.0f} MiB | {' | '.join(speeds)} |")


if __name__ == "__main__":
    main(sys.argv[1:])
