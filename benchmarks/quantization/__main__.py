"""What quantizing a checkpoint costs in quality: the tables of docs/quantization.md.

    python -m benchmarks.quantization [methods] [auto] [awq] [outliers] [--json FILE]

`methods`: each of them on one model, and llama.cpp's files beside them where it is installed (`python -m
benchmarks.engine.peers llamacpp`). `auto`: whether it finds the best. `awq`: beside GPTQ.
`outliers`: of activations, in int8. All four by default.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.quantization import auto, awq, outliers
from benchmarks.quantization.methods import Measurer
from benchmarks.quantization.methods import report as report_methods
from benchmarks.quantization.subjects import DATA, MODELS
from rich.console import Console
from rich.progress import Progress

from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

MODULES = {"auto": auto, "awq": awq, "outliers": outliers}
PARTS = ("methods", *MODULES)


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", default=PARTS, metavar="PART", help=", ".join(PARTS))
    parser.add_argument("--model", type=Path, default=MODELS / "tiny", help="of `methods`, as are the others")
    parser.add_argument("--text", type=Path, default=DATA / "dev.txt")
    parser.add_argument("--calibration", type=Path, default=DATA / "calibration.txt")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--calibration-windows", type=int, default=32)
    parser.add_argument("--only", nargs="+", help="rows of `methods` whose name begins so")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="file for the figures; those that are in it already are kept")
    args = parser.parse_args(argv)
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"{', '.join(sorted(unknown))}: there are {', '.join(PARTS)}")
    return args


def methods(found: dict[str, Any], args: argparse.Namespace, progress: Progress) -> str:
    """Measures the rows that are asked for; all that are known, as a table."""
    tokenizer = Tokenizer(args.model)
    measurer = Measurer(
        args.model,
        windows(args.text, tokenizer, args.windows, args.length),
        windows(args.calibration, tokenizer, args.calibration_windows, 512),
        args.threads,
    )
    chosen = [name for name in measurer.names() if not args.only or name.startswith(tuple(args.only))]
    for name in progress.track(chosen, description="quantizing"):
        found[name] = measurer.measure(name)
    return report_methods({name: found[name] for name in measurer.names() if name in found})


def main(argv: Sequence[str] | None = None) -> None:
    args = arguments(argv)
    found: dict[str, Any] = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    console = Console(width=200)

    def done() -> None:
        if args.json:
            args.json.write_text(json.dumps(found, indent=1) + "\n")

    for part in args.parts:
        own = found.setdefault(part, {})
        with Progress(console=Console(stderr=True), transient=True) as progress:
            if part == "methods":
                told = methods(own, args, progress)
            else:
                module: Any = MODULES[part]
                progress.add_task(part, total=None)
                module.run(own, done)
                told = module.report(own)
        done()
        console.print(told, markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
