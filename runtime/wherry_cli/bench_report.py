"""A measurement as tables, as JSON and as a picture."""

from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from wherry_cli.bench_chart import Chart, Line, page
from wherry_cli.bench_engine import Report, Spread

_SHOWN = ("quantization", "kv_cache_dtype", "max_batched_tokens", "block_size", "prefix_cache", "speculative")


def spread(value: Spread, scale: float = 1.0, digits: int = 1) -> str:
    """`median (low … high)`."""
    low, median, high = (f"{v * scale:.{digits}f}" for v in (value.low, value.median, value.high))
    return f"[bold]{median}[/] [dim]({low} … {high})[/]"


def size(num_bytes: float) -> str:
    """In binary units, three digits."""
    for unit in ("B", "KiB", "MiB"):
        if abs(num_bytes) < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.2f} GiB"


def show(report: Report) -> None:
    """Prints the tables."""
    console = Console(highlight=False)
    machine, memory = report.machine, report.memory
    console.print(
        f"[bold]{report.model}[/]: {report.parameters / 1e6:,.0f}M parameters, {report.dtype}", soft_wrap=True
    )
    console.print(", ".join(f"{k} {report.settings[k]}" for k in _SHOWN if k in report.settings), soft_wrap=True)
    console.print(
        f"{machine.get('gpu') or machine['processor']}, {machine['threads']} threads, load {machine['load_average']} "
        f"at the end; memory reads at {report.bandwidth / 1e9:.1f} GB/s; loaded in {report.load_s:.1f} s",
        soft_wrap=True,
    )
    prefill = Table("prompt tokens", "time to first token, ms", "tokens/s", title="Prefill, one prompt")
    for p in report.prefill:
        prefill.add_row(str(p.prompt_tokens), spread(p.seconds, 1e3), spread(p.rate, 1, 0))
    decode = Table("batch", "tokens/s", "scaling", "p50", "p90", "p99", "of bandwidth")
    decode.title, decode.caption = "Decode", "p50, p90, p99: milliseconds between the tokens of one request"
    for d in report.decode:
        scaling = d.rate.median / report.decode[0].rate.median * report.decode[0].batch
        gaps = [f"{d.gap_s[p] * 1e3:.1f}" for p in ("p50", "p90", "p99")]
        share = f"{d.bandwidth_share.median:.0%}"
        decode.add_row(str(d.batch), spread(d.rate), f"{scaling:.2f}x", *gaps, share)
    console.print(prefill, decode)
    console.print(
        f"Memory: {size(memory.process['total'])} resident = weights {size(memory.weights)} + KV cache "
        f"{size(memory.kv_cache)} + {size(memory.beyond)} ({memory.beyond_share:.0%} of these); "
        f"{size(memory.process['huge_pages'])} in huge pages, {size(memory.process['peak'])} at most; "
        f"{size(memory.before['total'])} before loading",
        soft_wrap=True,
    )
    for note in report.notes:
        console.print(f"[yellow]{note}[/]")


def picture(report: Report) -> str:
    """Decode throughput, inter-token latency and time to first token, side by side."""
    name = f"{Path(report.model).name}, {report.settings.get('quantization', 'none')}"
    rates = [(d.batch, d.rate.low, d.rate.median, d.rate.high) for d in report.decode]
    gaps = [(d.batch, d.gap_s["p50"] * 1e3, d.gap_s["p90"] * 1e3, d.gap_s["p99"] * 1e3) for d in report.decode]
    first = [(p.prompt_tokens, *(v * 1e3 for v in msgspec.structs.astuple(p.seconds))) for p in report.prefill]
    return page(
        [
            Chart("Decode", "requests at a time", "tokens/s", [Line(name, rates)]),
            Chart("Between tokens (p50, p90, p99)", "requests at a time", "ms", [Line(name, gaps)]),
            Chart("Time to first token", "prompt tokens", "ms", [Line(name, first)]),
        ]
    )


def save(report: Report, json: Path | None, plot: Path | None) -> None:
    """Writes the files that were asked for."""
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if plot:
        plot.write_text(picture(report))
