"""What each engine's formats cost in quality: `python -m benchmarks.engine.quality --json out.json`.

Perplexity and agreement on held-out text with a small trained model: random weights have no quality to lose. All
engines get the same token ids in the same windows. The reference is transformers in float32; agreement is the share of
positions at which the likeliest next token is the reference's (teacher-forced, so that one difference does not make all
that follow differ). Wherry's figures come from decoding token by token, so that they show the KV cache's type; the
others' from whole windows.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import msgspec
from benchmarks.engine import models, peers, report, variants
from benchmarks.engine.process import EngineFailed, EngineProcess
from benchmarks.engine.variants import Variant
from benchmarks.engine.workload import Job
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress

from wherry_runtime.quality.score import Score
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

TEXT = Path(__file__).resolve().parents[1] / "data" / "dev.txt"
REFERENCE = Variant("transformers", "f32", {"dtype": "float32"})
COMPARED = "llamacpp q8_0"  # what int8 is measured against


def wherry_variants() -> list[Variant]:
    """Every combination of formats that the engine has."""
    found = [Variant("wherry", "f32", {"dtype": "float32"}), Variant("wherry", "bf16", {"dtype": "bfloat16"})]
    for name, sizes in {"int8": (128,), "int4": (32, 64, 128)}.items():
        for size in sizes:
            options = {"dtype": "bfloat16", "quantization": name, "quantization_group": size}
            found.append(Variant("wherry", f"{name} g{size}", options))
    for cache in ("fp8", "int8"):
        found.append(Variant("wherry", f"bf16, KV cache {cache}", {"dtype": "bfloat16", "kv_cache_dtype": cache}))
    return found


def every() -> list[Variant]:
    found = [REFERENCE, *wherry_variants(), Variant("transformers", "bf16")]
    found += [Variant("llamacpp", name) for name in ("bf16", "q8_0", "q4_0", "q4_k_m")]
    found += [Variant("openvino", name) for name in ("int8", "int4")]
    return [v for v in found if peers.installed(v.engine)]


def summary(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, float]:
    """Perplexity; its distance to the reference's with a standard error (of the paired differences); agreement."""
    score = Score()
    for parts in zip(run["losses"], run["likeliest"], reference["losses"], reference["likeliest"], strict=True):
        score.add(*parts)
    found: dict[str, float] = msgspec.to_builtins(score.summary())
    del found["divergence"]  # which would take whole distributions
    return found


def score_all(args: argparse.Namespace, wanted: list[Variant]) -> dict[str, dict[str, Any]]:
    """Label → what each variant's process gave."""
    directory = models.make(args.model)
    found: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, Progress(console=Console(stderr=True), transient=True) as progress:
        file = Path(folder, "windows.json")
        file.write_text(json.dumps(windows(TEXT, Tokenizer(directory), args.windows, args.length)))
        for variant in progress.track(wanted, description="scoring"):
            job = Job(
                engine=variant.engine,
                variant=variant.name,
                model=str(directory),
                weights=str(variants.weights(variant, args.model)),
                vocab_size=models.vocab_size(directory),
                threads=args.threads,
                options=variant.options,
                windows=str(file),
            )
            try:
                with EngineProcess(job) as engine:
                    found[variant.label] = {**engine.loaded, **engine.ask()}
            except EngineFailed as error:
                found[variant.label] = {"error": str(error)}
    return found


def table(rows: dict[str, dict[str, float]]) -> str:
    """One row for each format, with the distance to llama.cpp's Q8_0 where that was scored."""
    base = rows.get(COMPARED, {}).get("perplexity")
    header = ["engine, format", "perplexity", "against float32", "against Q8_0", "agreement with float32"]
    lines = []
    for label, row in rows.items():
        engine, name = label.split(" ", 1)
        against = "–" if base is None else f"{row['perplexity'] / base - 1:+.3%}"
        change = f"{row['change']:+.3%} ± {row['error']:.3%}"
        lines.append(
            [report.name_of(engine, name), f"{row['perplexity']:.3f}", change, against, f"{row['agreement']:.2%}"]
        )
    return report.markdown(header, lines)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine.quality")
    parser.add_argument("--model", default="tiny", choices=["tiny"])
    parser.add_argument("--only", nargs="+", help="variants whose label has one of these words")
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = [v for v in every() if v == REFERENCE or not args.only or any(word in v.label for word in args.only)]
    variants.prepare(args.model, wanted)
    runs = score_all(args, wanted)
    for label, run in runs.items():
        if "error" in run:
            Console(stderr=True).print(f"{label}: {run['error']}", markup=False, soft_wrap=True)
    reference = runs[REFERENCE.label]
    rows = {label: summary(run, reference) for label, run in runs.items() if "error" not in run}
    shown = table(rows)
    Console().print(Markdown(shown))
    if args.json:
        settings = {label: run["settings"] for label, run in runs.items() if "error" not in run}
        results = {"model": "quality", "rows": rows, "settings": settings, "table": shown}
        args.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
