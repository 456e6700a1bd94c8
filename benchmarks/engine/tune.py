"""Which settings make a peer fastest: `python -m benchmarks.engine.tune --model 1.1b --only q8_0 --json out.json`.

The winners are what `llamacpp.py` and `openvino.py` run with. Trials take turns, as engines do in the comparison.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.engine import models, report, variants
from benchmarks.engine.__main__ import complain, figures_of, job_for
from benchmarks.engine.turns import Company
from benchmarks.engine.variants import Variant
from benchmarks.engine.workload import Job
from rich.console import Console
from rich.progress import Progress

BASE = "as compared"
TRIALS: dict[str, dict[str, dict[str, Any]]] = {
    "llamacpp": {
        BASE: {},
        "no huge pages": {"huge_pages": False},
        "weights mapped from the file": {"mmap": True},
        "no flash attention": {"flash_attention": 0},
        "one cache for all sequences": {"unified_cache": True},
        "weights not rearranged": {"repack": False},
        "prefill in steps of 128": {"ubatch": 128},
    },
    "openvino": {
        BASE: {},
        "no huge pages": {"huge_pages": False},
        "float32 activations": {"properties": {"INFERENCE_PRECISION_HINT": "f32"}},
        "no dynamic quantization": {"properties": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "0"}},
        "dynamic quantization by 128": {"properties": {"DYNAMIC_QUANTIZATION_GROUP_SIZE": "128"}},
        "throughput hint": {"properties": {"PERFORMANCE_HINT": "THROUGHPUT"}},
        "KV cache bf16": {"properties": {"KV_CACHE_PRECISION": "bf16"}},
    },
}


def trials(args: argparse.Namespace, variant: Variant) -> list[Job]:
    """One for each setting, all of one engine with one format."""
    job = job_for(args, variant)
    return [
        replace(job, variant=f"{variant.name}, {name}", options={**job.options, **options})
        for name, options in TRIALS[variant.engine].items()
    ]


def measure(args: argparse.Namespace, wanted: list[Variant]) -> list[dict[str, Any]]:
    """The trials of one engine and format take turns with one another."""
    runs: list[dict[str, Any]] = []
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for variant in progress.track(wanted, description="trying"):
            with Company(trials(args, variant), failed=complain, loading=lambda job: None) as company:
                for kind, size in figures_of(args):
                    for _ in company.turns(kind, size, args.rounds):
                        pass
                runs += company.runs
            save(args, runs)
    return runs


def save(args: argparse.Namespace, runs: list[dict[str, Any]]) -> report.Results:
    """After every run: minutes of measuring are not lost."""
    results = {"model": f"{args.model} trials", "runs": runs}
    results["table"] = table(results)
    if args.json:
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    return results


def table(results: report.Results) -> str:
    """Each trial's rates and what of its memory lies in huge pages."""
    columns = report.cells(results)
    rows = []
    for engine in TRIALS:
        for label, runs in report.runs_of(results, engine).items():
            rates = [report.span((r for run in runs if (r := c.rate(run))), report.rate_text) for c in columns]
            huge = max(run["memory"]["huge"] / run["memory"]["rss"] for run in runs)
            rows.append([f"{report.ENGINES[engine]} {label}", *rates, f"{huge:.0%}"])
    return report.markdown(["trial", *(f"{c.kind} {c.size}" for c in columns), "in huge pages"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="1.1b", choices=[*models.SHAPES, "tiny"])
    parser.add_argument("--only", nargs="+", help="variants whose label has one of these words")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prefill", type=int, nargs="+", default=[256])
    parser.add_argument("--prompt-tokens", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    wanted = [v for v in variants.every() if not args.only or any(word in v.label for word in args.only)]
    wanted = [v for v in wanted if v.engine in TRIALS]
    variants.prepare(args.model, wanted)
    print(save(args, measure(args, wanted))["table"])


if __name__ == "__main__":
    main()
