"""All engines in one run: `python -m benchmarks.engine --model 1.1b --rounds 3 --json out.json`.

Each round runs every engine with every format once, one process after another, so that what disturbs the machine for a
while hits all of them alike; ratios are taken within a round. Read bandwidth is measured in each round, too.
"""

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from benchmarks.engine import models, peers, report, variants
from benchmarks.engine.workload import Job
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from wherry_cli import bench_machine

LIMIT_S = 600  # for one engine with one format
console = Console(stderr=True)


def run_job(job: Job, engine: str) -> dict[str, Any]:
    """One process: what it measured, or {"error": …} with the end of what it wrote."""
    with tempfile.TemporaryDirectory() as folder:
        job_file, result = Path(folder, "job.json"), Path(folder, "result.json")
        job_file.write_text(json.dumps(asdict(job)))
        command = [peers.python(engine), "-m", f"benchmarks.engine.{engine}", job_file, result]
        environment = variants.environment(huge_pages=job.options.get("huge_pages", True))
        with Path(folder, "log").open("w+") as log:
            try:
                subprocess.run(
                    [str(c) for c in command],
                    cwd=models.ROOT,
                    env=environment,
                    timeout=LIMIT_S,
                    check=True,
                    stdout=log,
                    stderr=log,
                    stdin=subprocess.DEVNULL,
                )
            except (subprocess.CalledProcessError, subprocess.TimeoutExpired) as error:
                log.seek(0)
                return {"error": f"{type(error).__name__}: {log.read()[-2000:].strip()}"}
        return dict(json.loads(result.read_text()))


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.engine", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="1.1b", choices=[*models.SHAPES, "tiny"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="variants whose label has one of these words")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4, 8, 16])
    parser.add_argument("--prefill", type=int, nargs="+", default=[512])
    parser.add_argument("--prompt-tokens", type=int, default=32, help="of each sequence before it decodes")
    parser.add_argument("--new-tokens", type=int, default=36)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path, help="where the figures go, after every round")
    parser.add_argument("--plot", type=Path, help="an SVG file")
    return parser.parse_args()


def chosen(only: list[str] | None) -> list[variants.Variant]:
    return [v for v in variants.every() if not only or any(word in v.label for word in only)]


def job_for(args: argparse.Namespace, variant: variants.Variant, number: int) -> Job:
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
        seed=number,
        options=variant.options,
    )


def one_round(
    args: argparse.Namespace, number: int, wanted: list[variants.Variant], step: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Every variant once, in another order in each round: the last one of a round meets no warmer machine."""
    runs = []
    shift = number * len(wanted) // max(args.rounds, 1)
    for variant in wanted[shift:] + wanted[:shift]:
        step(variant.label)
        result = run_job(job_for(args, variant, number), variant.engine)
        if "error" in result:
            console.print(f"[red]{variant.label}:[/] {result['error']}", markup=True, soft_wrap=True)
        runs.append({"round": number, "engine": variant.engine, "variant": variant.name, **result})
    return runs


def as_json(results: dict[str, Any]) -> str:
    """Without the directories of this machine."""
    return json.dumps(results, indent=1).replace(f"{models.MODELS}/", "") + "\n"


def main() -> None:
    args = arguments()
    wanted = chosen(args.only)
    for missing in (name for name in peers.ENVIRONMENTS if not peers.installed(name)):
        console.print(
            f"[yellow]{missing} is not installed and left out: python -m benchmarks.engine.peers {missing}[/]"
        )
    if not wanted:
        sys.exit(f"no variant is called {' or '.join(args.only)}; there are: {', '.join(map(label, variants.every()))}")
    variants.prepare(args.model, wanted)
    results: dict[str, Any] = {
        "model": args.model,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "command": f"python -m benchmarks.engine --model {args.model} --rounds {args.rounds} --json out.json",
        "machine": bench_machine.describe(torch.device("cpu"), args.threads),
        "bandwidth": [],
        "runs": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=args.rounds * len(wanted))

        def step(what: str) -> None:
            progress.update(task, description=f"round {number + 1}: {what}", completed=len(results["runs"]))

        for number in range(args.rounds):
            results["bandwidth"].append(bench_machine.read_bandwidth(args.threads, torch.device("cpu")))
            results["runs"] += one_round(args, number, wanted, step)
            if args.json:
                args.json.write_text(as_json(results))
    Console().print(Markdown(report.tables(results)))
    if args.plot:
        args.plot.write_text(report.picture(results))


def label(variant: variants.Variant) -> str:
    return variant.label


if __name__ == "__main__":
    main()
