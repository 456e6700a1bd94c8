"""All engines in one run: `python -m benchmarks.engine --model 1.1b --rounds 5 --json out.json`.

Every engine with every format is loaded and stays; they take turns (turns.py). The 1.1B shape takes 20 GiB so.
transformers, which no target is set against, comes after the others have ended.
"""

import argparse
import datetime
import json
import sys
from pathlib import Path
from typing import Any

import torch
from benchmarks.engine import models, peers, report, variants
from benchmarks.engine.turns import Company, rounds_for
from benchmarks.engine.workload import Job
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wherry_cli import bench_machine

APART = "transformers"
console = Console(stderr=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="1.1b", choices=[*models.SHAPES, "tiny"])
    parser.add_argument("--rounds", type=int, default=5, help="of each figure; batch 1 has more")
    parser.add_argument("--only", nargs="+", metavar="WORD", help="variants whose label has one of these words")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512])
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each sequence before it decodes")
    parser.add_argument("--new-tokens", type=int, default=36)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures go, after every figure")
    parser.add_argument("--plot", type=Path, help="an SVG file")
    return parser.parse_args()


def chosen(only: list[str] | None) -> list[variants.Variant]:
    return [v for v in variants.every() if not only or any(word in v.label for word in only)]


def job_for(args: argparse.Namespace, variant: variants.Variant) -> Job:
    directory = models.make(args.model)
    return Job(
        engine=variant.engine,
        variant=variant.name,
        model=str(directory),
        weights=str(variants.weights(variant, args.model)),
        vocab_size=models.vocab_size(directory),
        threads=args.threads,
        prefill=tuple(args.prefill),
        batches=tuple(sorted(args.batch)),
        prompt_tokens=args.prompt_tokens,
        new_tokens=args.new_tokens,
        options=variant.options,
    )


def figures_of(args: argparse.Namespace) -> list[tuple[str, int]]:
    """What is measured, and at which size, in order."""
    return [("decode", size) for size in args.batch] + [("prefill", size) for size in args.prefill]


def complain(job: Job, error: str) -> None:
    console.print(f"[red]{job.engine} {job.variant}:[/] ", end="")
    console.print(error, markup=False, soft_wrap=True)


def measure(args: argparse.Namespace, jobs: list[Job], results: dict[str, Any]) -> None:
    """All figures of engines that are resident together, into results["runs"]."""
    figures = figures_of(args)
    total = len(jobs) * (1 + sum(rounds_for(*figure, args.rounds) for figure in figures))
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)

        def step(what: str, job: Job) -> None:
            progress.update(task, description=f"{what}: {job.engine} {job.variant}", advance=1)

        done = results["runs"]
        with Company(jobs, failed=complain, loading=lambda job: step("loading", job)) as company:
            for kind, size in figures:
                for job in company.turns(kind, size, rounds_for(kind, size, args.rounds)):
                    step(f"{kind} {size}", job)
                results["runs"] = done + company.runs
                if args.json:
                    args.json.write_text(as_json(results))


def as_json(results: dict[str, Any]) -> str:
    """Without the directories of this machine."""
    return json.dumps(results, indent=1).replace(f"{models.MODELS}/", "") + "\n"


def main() -> None:
    args = arguments()
    wanted = chosen(args.only)
    for missing in (name for name in peers.ENGINES if not peers.installed(name)):
        console.print(
            f"[yellow]{missing} is not installed and left out: python -m benchmarks.engine.peers {missing}[/]"
        )
    if not wanted:
        names = ", ".join(v.label for v in variants.every())
        sys.exit(f"no variant is called {' or '.join(args.only)}; there are: {names}")
    variants.prepare(args.model, wanted)
    results: dict[str, Any] = {
        "model": args.model,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m benchmarks.engine --model {args.model} --rounds {args.rounds} --json out.json",
        "machine": bench_machine.describe(torch.device("cpu"), args.threads),
        "runs": [],
    }
    for apart in (False, True):
        if cast := [job_for(args, v) for v in wanted if (v.engine == APART) is apart]:
            measure(args, cast, results)
    Console().print(Markdown(report.tables(results)))
    if args.plot:
        args.plot.write_text(report.picture(results))


if __name__ == "__main__":
    main()
