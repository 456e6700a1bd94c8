"""What these benchmarks share: options, the machine, tables and files."""

import argparse
import json
import os
import platform
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.engine import peers
from benchmarks.router.routers import ROUTERS, install
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"
DIRECT = "direct"


def options(doc: str | None, name: str) -> argparse.ArgumentParser:
    """A parser with what all of them take."""
    parser = argparse.ArgumentParser(description=(doc or "").splitlines()[0], allow_abbrev=False)
    parser.add_argument("--routers", nargs="+", choices=ROUTERS, default=list(ROUTERS), help="default: all")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json", help="default: %(default)s")
    parser.add_argument("--markdown", action="store_true", help="print the table as the documentation has it")
    return parser


def prepare(names: list[str]) -> None:
    """Installs what is missing, before anything is timed. Told to stop, what was started ends too, as on Ctrl-C."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    install(names)


def percentile(values: Sequence[float], share: float) -> float:
    """Of values in any order, at least one."""
    ordered = sorted(values)
    return ordered[min(int(share / 100 * len(ordered)), len(ordered) - 1)]


def machine() -> dict[str, Any]:
    """What a reader has to know to place the figures."""
    text = Path("/proc/cpuinfo").read_text()
    model = next((line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")), "")
    return {
        "processor": model,
        "cpus": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 2),
        "python": platform.python_version(),
        "routers": [
            line
            for name in ("vllm-router", "sglang-router", "smg", "envoy", "litellm")
            for line in peers.ENVIRONMENTS[name].requirements
        ],
    }


def save(path: Path, result: dict[str, Any]) -> None:
    """Writes it with the machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**result, "machine": machine()}, indent=1, ensure_ascii=False) + "\n")


def show(title: str, headings: list[str], rows: list[list[str]], *, markdown: bool) -> None:
    """A table on the terminal, or as text for a page."""
    if markdown:
        lines = [headings, ["---"] * len(headings), *rows]
        print("\n".join(f"| {' | '.join(line)} |" for line in lines))
        return
    table = Table(*headings, title=title)
    for row in rows:
        table.add_row(*row)
    console = Console()
    console.width = max(console.width, 110)
    console.print(table)
