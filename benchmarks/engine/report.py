"""The tables of docs/performance/engine.md, from what a run wrote: `python -m benchmarks.engine.report out.json …`.

With `--page FILE` each table goes between the lines `<!-- table: NAME -->` and `<!-- end -->` of a page, NAME being the
model's.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherry_cli.bench_chart import Chart, Line, page

Results = dict[str, Any]
ENGINES = {"wherry": "Wherry", "llamacpp": "llama.cpp", "openvino": "OpenVINO GenAI", "transformers": "transformers"}
FORMATS = {"q8_0": "Q8_0", "q4_0": "Q4_0", "q4_k_m": "Q4_K_M"}


@dataclass(frozen=True)
class Cell:
    """One figure of one run: prefill of some tokens, or decode with some batch."""

    kind: str  # `prefill` or `decode`
    size: str

    def rate(self, run: dict[str, Any]) -> float | None:
        """Tokens per second."""
        found = run.get(self.kind, {}).get(self.size)
        return None if found is None else float(found["rate"])


@dataclass(frozen=True)
class Target:
    """What has to hold: the best of ours over the best of theirs, each one (engine, formats; none: any)."""

    text: str
    cell: Cell
    ours: tuple[str, ...]
    peer: str
    theirs: tuple[str, ...]
    least: float


def _decode(batch: int) -> Cell:
    return Cell("decode", str(batch))


PREFILL = Cell("prefill", "512")
TARGETS = [
    Target("int8, batch 1", _decode(1), ("int8",), "llamacpp", ("q8_0",), 1.6),
    Target("int8, batch 1", _decode(1), ("int8",), "openvino", ("int8",), 1.8),
    Target("int4, batch 1", _decode(1), ("int4", "int4 g64"), "llamacpp", ("q4_0", "q4_k_m"), 1.4),
    Target("bf16, batch 1", _decode(1), ("bf16",), "llamacpp", ("bf16",), 1.2),
    Target("best format, batch 8", _decode(8), (), "llamacpp", (), 3.0),
    Target("best format, batch 16", _decode(16), (), "llamacpp", (), 3.0),
    Target("best format, batch 8", _decode(8), (), "openvino", (), 1.6),
    Target("best format, batch 16", _decode(16), (), "openvino", (), 1.3),
    Target("int8, prefill of 512", PREFILL, ("int8",), "openvino", ("int8",), 1.3),
    Target("int8, prefill of 512", PREFILL, ("int8",), "llamacpp", ("q8_0",), 5.0),
    Target("bf16, prefill of 512", PREFILL, ("bf16",), "llamacpp", ("bf16",), 2.0),
]
SCALING = {4: 3.2, 8: 5.0, 16: 6.5}  # bf16, against batch 1
TWO_SPEEDS = 1.3  # fastest to slowest read of memory in a run, from which on they are shown apart
BANDWIDTH = {"int8": 0.85, "int4": 0.65, "int4 g64": 0.65}  # at batch 1


def name_of(engine: str, variant: str) -> str:
    """`llamacpp`, `q8_0` → `llama.cpp Q8_0`. How OpenVINO was run is left out."""
    form = variant.split("+")[0]
    return f"{ENGINES[engine]} {FORMATS.get(form, form)}"


def runs_of(results: Results, engine: str, formats: Iterable[str] = ()) -> dict[str, list[dict[str, Any]]]:
    """Variant → its runs, in the order of rounds."""
    wanted = set(formats)
    found: dict[str, list[dict[str, Any]]] = {}
    for run in results["runs"]:
        if run["engine"] == engine and (not wanted or run["variant"].split("+")[0] in wanted):
            found.setdefault(run["variant"], []).append(run)
    return found


def best(groups: dict[str, list[dict[str, Any]]], cell: Cell) -> tuple[str, dict[int, float]]:
    """The variant with the highest median in `cell`, and its rate in each round."""
    rates = {
        variant: {run["round"]: rate for run in runs if (rate := cell.rate(run)) is not None}
        for variant, runs in groups.items()
    }
    rates = {variant: values for variant, values in rates.items() if values}
    if not rates:
        return "", {}
    chosen = max(rates, key=lambda variant: statistics.median(rates[variant].values()))
    return chosen, rates[chosen]


def span(values: Iterable[float], form: Callable[[float], str]) -> str:
    """`median (lowest to highest)`."""
    got = list(values)
    if not got:
        return "–"
    return f"{form(statistics.median(got))} ({form(min(got))} to {form(max(got))})"


def rate_text(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}"


def ratio_text(value: float) -> str:
    return f"{value:.2f}"


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def cells(results: Results) -> list[Cell]:
    """What was measured, in the order of columns: decode by batch, then prefill by length."""
    found = {(kind, size) for run in results["runs"] for kind in ("decode", "prefill") for size in run.get(kind, {})}
    return [Cell(kind, size) for kind, size in sorted(found, key=lambda c: (c[0], int(c[1])))]


def rates_table(results: Results) -> str:
    """Tokens per second of each engine and format; of OpenVINO's two pipelines the better one."""
    columns = cells(results)
    header = ["engine, format", *(f"{c.kind} {c.size}" for c in columns), "memory, GB"]
    rows = []
    for engine in ENGINES:
        for form in dict.fromkeys(v.split("+")[0] for v in runs_of(results, engine)):
            groups = runs_of(results, engine, [form])
            memory = min(run["memory"]["rss"] for runs in groups.values() for run in runs)
            values = [span(best(groups, cell)[1].values(), rate_text) for cell in columns]
            rows.append([name_of(engine, form), *values, f"{memory / 1e9:.2f}"])
    return markdown(header, rows)


def ratios_table(results: Results) -> str:
    """Each target, and what was measured."""
    rows = []
    for target in TARGETS:
        ours_name, ours = best(runs_of(results, "wherry", target.ours), target.cell)
        theirs_name, theirs = best(runs_of(results, target.peer, target.theirs), target.cell)
        ratios = [ours[n] / theirs[n] for n in ours if n in theirs]
        if ratios:
            pair = f"{name_of('wherry', ours_name)} / {name_of(target.peer, theirs_name)}"
            rows.append([target.text, pair, f"≥ {target.least:g}", span(ratios, ratio_text)])
    return markdown(["what", "ratio of", "target", "measured"], rows + _own_rows(results)) if rows else ""


def _own_rows(results: Results) -> list[list[str]]:
    rows = []
    _, single = best(runs_of(results, "wherry", ["bf16"]), _decode(1))
    for batch, least in SCALING.items():
        _, many = best(runs_of(results, "wherry", ["bf16"]), _decode(batch))
        if ratios := [many[n] / single[n] for n in many if n in single]:
            pair = f"Wherry bf16, batch {batch} / batch 1"
            rows.append(["own scaling", pair, f"≥ {least:g}", span(ratios, ratio_text)])
    for form, share in BANDWIDTH.items():
        for runs in runs_of(results, "wherry", [form]).values():
            shares = [
                rate * run["settings"]["read_per_step"] / run["bandwidth"]
                for run in runs
                if (rate := _decode(1).rate(run)) is not None and run["settings"].get("read_per_step")
            ]
            pair = f"Wherry {form}, batch 1"
            if shares:
                rows.append(["share of read bandwidth", pair, f"≥ {share:.0%}", span(shares, "{:.0%}".format)])
    return rows


def by_memory_table(results: Results) -> str:
    """Batch 1 by what memory gave while each engine had its turn, where that was not the same all the time: medians."""
    speeds = sorted(run["bandwidth"] / 1e9 for run in results["runs"] if "bandwidth" in run)
    if not speeds or speeds[-1] < TWO_SPEEDS * speeds[0]:
        return ""
    middle = (speeds[0] + speeds[-1]) / 2
    halves = [[v for v in speeds if v < middle], [v for v in speeds if v >= middle]]
    header = ["batch 1", *(f"read bandwidth {span(half, '{:.0f}'.format)} GB/s" for half in halves)]
    rows = []
    for target in (t for t in TARGETS if t.cell == _decode(1)):
        ours_name, theirs_name = (" or ".join(FORMATS.get(f, f) for f in side) for side in (target.ours, target.theirs))
        row = [f"Wherry {ours_name} / {ENGINES[target.peer]} {theirs_name}"]
        for fast in (False, True):
            ours, theirs = (
                _median_single(runs_of(results, *side), middle, fast)
                for side in (("wherry", target.ours), (target.peer, target.theirs))
            )
            row.append(f"{ours:.1f} / {theirs:.1f} = {ours / theirs:.2f}" if ours and theirs else "–")
        rows.append(row)
    return markdown(header, rows)


def _median_single(groups: dict[str, list[dict[str, Any]]], middle: float, fast: bool) -> float:
    """Tokens per second at batch 1 of the best variant, from runs while memory was faster than `middle` GB/s or not."""
    medians = [0.0]
    for runs in groups.values():
        rates = [
            rate
            for run in runs
            if (rate := _decode(1).rate(run)) is not None and (run["bandwidth"] / 1e9 >= middle) is fast
        ]
        medians += [statistics.median(rates)] if rates else []
    return max(medians)


def settings_list(results: Results) -> str:
    """How each engine was run, as it said itself."""
    lines = {}
    for run in results["runs"]:
        shown = {k: v for k, v in run.get("settings", {}).items() if k not in ("system", "read_per_step")}
        text = ", ".join(f"{k} {v}" for k, v in shown.items())
        lines[f"- {ENGINES[run['engine']]} {run['variant']}: {text}"] = None
    return "\n".join(lines)


def tables(results: Results) -> str:
    """Everything of one run, as Markdown."""
    machine = results["machine"]
    bandwidth = span((run["bandwidth"] / 1e9 for run in results["runs"] if "bandwidth" in run), "{:.1f}".format)
    ground = (
        f"{results['date']}, {machine['processor']}, {machine['threads']} threads; read bandwidth {bandwidth} GB/s. "
        "Tokens per second, median (lowest to highest):"
    )
    parts = [
        f"`{results['command']}`",
        ground,
        rates_table(results),
        ratios_table(results),
        by_memory_table(results),
        settings_list(results),
    ]
    return "\n\n".join(part for part in parts if part)


def picture(results: Results) -> str:
    """Decode throughput by batch size, each engine's every format."""
    lines = []
    for engine in ENGINES:
        for form in dict.fromkeys(v.split("+")[0] for v in runs_of(results, engine)):
            points = []
            for cell in (c for c in cells(results) if c.kind == "decode"):
                if values := list(best(runs_of(results, engine, [form]), cell)[1].values()):
                    points.append((float(cell.size), min(values), statistics.median(values), max(values)))
            lines.append(Line(name_of(engine, form), points))
    return page([Chart(f"Decode, {results['model']}", "sequences at a time", "tokens/s", lines)])


def fill(text: str, name: str, table: str) -> str:
    """`text` with `table` in the place that is marked for `name`.

    Raises:
        ValueError: there is no such place.
    """
    pattern = re.compile(rf"(<!-- table: {re.escape(name)} -->\n).*?(<!-- end -->)", re.DOTALL)
    if not pattern.search(text):
        raise ValueError(f"the page has no lines <!-- table: {name} --> and <!-- end -->")
    return pattern.sub(lambda m: f"{m[1]}{table}\n{m[2]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description="Tables from results")
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--page", type=Path, help="write them into this page")
    args = parser.parse_args()
    for file in args.results:
        results = json.loads(file.read_text())
        table = results.get("table") or tables(results)
        if args.page:
            args.page.write_text(fill(args.page.read_text(), results["model"], table))
        else:
            print(table)


if __name__ == "__main__":
    main()
