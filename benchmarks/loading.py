"""How long a model of a billion weights takes to its first token, and how much memory: docs/performance/loading.md.

    python -m benchmarks.loading [--rounds 5] [--json FILE]

The checkpoint has the shape of Llama 3.2 1B with random weights, in bfloat16 (2.5 GB, kept in the cache for the next
time). Before each turn all of it is read, so that it is in the page cache. Then, in turns, a process of its own:

- `wherry`: imports what `wherry serve` imports, starts an engine with its defaults, and asks for the first token after
  a prompt of 16; then for that of another such prompt, which tells what of the first is loading.
- `transformers`: from_pretrained in bfloat16, and one pass over the prompt.
- `read`: maps the file and reads every byte once with as many threads: what no loader that reads the weights can beat.

Peak memory is the kernel's own (VmHWM); anonymous memory is looked at every few milliseconds from outside.

    python -m benchmarks.loading --quantize int8 int4 gptq awq

measures `wherry quantize` on the same checkpoint instead. Methods that look at text are given four windows of 128
tokens and the checkpoint's first two layers, with its whole embedding: more text takes disk, and more layers time.
"""

import argparse
import asyncio
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks.engine import models

MODEL = "1b-tied"
PROMPT = 16
SAMPLE_S = 0.004
READ = 8 << 20
LIMIT_S = 300
LAYERS = 2
SECONDS = ("imports", "loading", "first_token", "next_prompt", "packed", "process_to_token")


def prompts(directory: Path) -> list[list[int]]:
    """Two that have no prefix in common."""
    draw, size = random.Random(0), models.vocab_size(directory)
    return [[draw.randrange(10, size) for _ in range(PROMPT)] for _ in range(2)]


def status(pid: int | str = "self") -> dict[str, int]:
    """Bytes by the names of /proc/PID/status: VmHWM, RssAnon and others."""
    found = {}
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if value.endswith(" kB"):
            found[name] = int(value.split()[0]) * 1024
    return found


def wherry(directory: Path, threads: int) -> dict[str, float]:
    import wherry_runtime.server.app  # noqa: F401 - what `wherry serve` imports
    from wherry_protocol.engine_config import EngineConfig
    from wherry_protocol.worker import ExecuteRequest, Prompt, SamplingParams
    from wherry_runtime.engine.async_engine import AsyncEngine
    from wherry_runtime.kernels.cpu.model import NativeModel

    imported, before = time.monotonic(), status()

    async def serve() -> dict[str, float]:
        engine = AsyncEngine(EngineConfig(model_uri=str(directory), model_name="bench", threads=threads))
        await engine.start()
        marks = [time.monotonic()]
        for number, prompt in enumerate(prompts(directory)):
            sampling = SamplingParams(max_tokens=1, temperature=0, ignore_eos=True)
            request = ExecuteRequest(id=f"{number}", model="bench", prompt=Prompt(token_ids=prompt), sampling=sampling)
            async for _ in engine.generate(request):
                pass
            marks.append(time.monotonic())
        # Its peak is that of everything: until weights are packed, which nobody waits for but this.
        model = engine._ready().runner.model
        if isinstance(model, NativeModel):
            await asyncio.to_thread(model.settling.done.wait, LIMIT_S)
        marks.append(time.monotonic())
        after = status()
        await engine.close()
        return {
            "imported": imported,
            "loading": marks[0] - imported,
            "first_token": marks[1] - imported,
            "next_prompt": marks[2] - marks[1],
            "packed": marks[3] - imported,
            "done": marks[1],
            **{f"imports_{name}": before[name] for name in ("VmRSS", "RssAnon")},
            **{name: after[name] for name in ("VmHWM", "VmRSS", "RssAnon")},
        }

    return asyncio.run(serve())


def transformers(directory: Path, threads: int) -> dict[str, float]:
    import torch
    import transformers as library

    library.logging.set_verbosity_error()
    torch.set_num_threads(threads)
    _ = library.LlamaForCausalLM  # imported when it is first named
    imported, before = time.monotonic(), status()
    model = library.LlamaForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    marks = [time.monotonic()]
    for prompt in prompts(directory):
        with torch.inference_mode():
            model(torch.tensor([prompt]), logits_to_keep=1).logits.argmax().item()
        marks.append(time.monotonic())
    after = status()
    return {
        "imported": imported,
        "loading": marks[0] - imported,
        "first_token": marks[1] - imported,
        "next_prompt": marks[2] - marks[1],
        "done": marks[1],
        **{f"imports_{name}": before[name] for name in ("VmRSS", "RssAnon")},
        **{name: after[name] for name in ("VmHWM", "VmRSS", "RssAnon")},
    }


def read(directory: Path, threads: int) -> dict[str, float]:
    import numpy as np

    imported = time.monotonic()
    data = np.memmap(directory / "model.safetensors", np.uint8, "r")
    words = data[: data.size // 8 * 8].view(np.uint64)
    with ThreadPoolExecutor(threads) as pool:  # NumPy gives up the interpreter's lock
        sum(pool.map(lambda part: int(part.max()), np.array_split(words, threads)))
    done = time.monotonic()
    return {"imported": imported, "loading": done - imported, "first_token": done - imported, "done": done}


CHILDREN: dict[str, Callable[[Path, int], dict[str, float]]] = {
    "wherry": wherry,
    "transformers": transformers,
    "read": read,
}


def turn(name: str, directory: Path, threads: int) -> dict[str, float]:
    """One child, watched."""
    with (directory / "model.safetensors").open("rb", buffering=0) as file:
        while file.read(READ):
            pass
    command = [sys.executable, "-m", "benchmarks.loading", "--child", name, "--threads", str(threads)]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    began = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=models.ROOT, env=environment, text=True) as child:
        most = 0
        while child.poll() is None and time.monotonic() < began + LIMIT_S:
            most = max(most, status(child.pid).get("RssAnon", 0))
            time.sleep(SAMPLE_S)
        child.kill()
        out = child.stdout.read() if child.stdout is not None else ""
    if child.returncode:
        raise SystemExit(f"{name} failed")
    found = dict(json.loads(out.splitlines()[-1]))
    found |= {"imports": found["imported"] - began, "process_to_token": found["done"] - began, "peak_anonymous": most}
    return found


def first_layers(directory: Path, count: int) -> Path:
    """A checkpoint of some of the layers."""
    import torch
    from safetensors import safe_open
    from safetensors.torch import save_file

    target = directory.with_name(f"{directory.name}-{count}")
    if (target / "config.json").exists():
        return target
    target.mkdir(exist_ok=True)
    tensors: dict[str, torch.Tensor] = {}
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        for name in file.keys():  # noqa: SIM118 - safe_open has keys() and is not iterable
            parts = name.split(".")
            if parts[1] != "layers" or int(parts[2]) < count:
                tensors[name] = file.get_tensor(name)
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    for other in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(directory / other, target / other)
    config = json.loads((directory / "config.json").read_text())
    (target / "config.json").write_text(json.dumps({**config, "num_hidden_layers": count}))
    return target


def quantize(directory: Path, method: str) -> tuple[float, int]:
    """Seconds and most bytes of `wherry quantize`."""
    extra: list[str] = []
    if method in ("gptq", "awq"):
        directory = first_layers(directory, LAYERS)
        text = models.ROOT / "benchmarks" / "data" / "calibration.txt"
        extra = ["--calibration", str(text), "--windows", "4", "--length", "128"]
    with tempfile.TemporaryDirectory(dir=models.CACHE) as folder:
        program = "from wherry_cli.main import main; main()"
        command = [sys.executable, "-c", program, "quantize", str(directory), f"{folder}/out", "--method", method]
        began, most = time.monotonic(), 0
        with subprocess.Popen([*command, *extra], cwd=models.ROOT, stdout=subprocess.DEVNULL) as child:
            while child.poll() is None:
                most = max(most, status(child.pid).get("VmHWM", 0))
                time.sleep(SAMPLE_S)
        if child.returncode:
            raise SystemExit(f"{method} failed")
    return time.monotonic() - began, most


def report_quantizing(directory: Path, methods: list[str]) -> None:
    """The table, in Markdown."""
    size = (directory / "model.safetensors").stat().st_size
    print("| method | layers | peak, GB | of the bf16 weights' bytes | seconds |\n|---|---|---|---|---|")
    for method in methods:
        seconds, most = quantize(directory, method)
        layers = str(LAYERS) if method in ("gptq", "awq") else "all"
        print(f"| {method} | {layers} | {most / 1e9:.2f} | {most / size:.2f} | {seconds:.0f} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", nargs="+", default=list(CHILDREN), choices=list(CHILDREN))
    parser.add_argument("--json", type=Path, help="keep every turn's figures")
    parser.add_argument("--child", choices=list(CHILDREN), help=argparse.SUPPRESS)
    parser.add_argument("--quantize", nargs="+", metavar="METHOD", help="measure these methods instead")
    args = parser.parse_args()
    directory = models.make(MODEL)
    if args.quantize:
        report_quantizing(directory, args.quantize)
        return
    if args.child:
        print(json.dumps(CHILDREN[args.child](directory, args.threads)))
        return
    turns: dict[str, list[dict[str, float]]] = {name: [] for name in args.only}
    for _ in range(args.rounds):
        for name in args.only:
            turns[name].append(turn(name, directory, args.threads))
    size = (directory / "model.safetensors").stat().st_size
    report(turns, size)
    if args.json:
        args.json.write_text(json.dumps({"bytes": size, "load": os.getloadavg(), "turns": turns}, indent=1))


def report(turns: dict[str, list[dict[str, float]]], size: int) -> None:
    """The tables, in Markdown."""
    count = len(next(iter(turns.values())))
    print(f"{size / 1e9:.2f} GB; best (median) of {count} turns; load of the machine {os.getloadavg()[0]:.1f}\n")
    heads = (
        "imports",
        "loading",
        "to the first token",
        "of the next prompt",
        "until packed",
        "from the process's start",
    )
    print(f"| seconds | {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|")
    for name, found in turns.items():
        cells = [[t[key] for t in found if key in t] for key in SECONDS]
        shown = [f"{min(c):.2f} ({statistics.median(c):.2f})" if c else "–" for c in cells]
        print(f"| {name} | {' | '.join(shown)} |")
    print("\n| of the weights' bytes | peak | of it after the imports | anonymous, peak | after imports | at the end |")
    print("|---|---|---|---|---|---|")
    for name, found in turns.items():
        if "VmHWM" in found[0]:
            most: dict[str, Any] = {key: max(t[key] for t in found) / size for key in found[0]}
            cells = ["VmHWM", "imports_VmRSS", "peak_anonymous", "imports_RssAnon", "RssAnon"]
            print(f"| {name} | {' | '.join(f'{most[c]:.3f}' for c in cells)} |")


if __name__ == "__main__":
    main()
