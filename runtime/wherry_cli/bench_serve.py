"""What `wherry bench serve` was told, as a plan; and the test's figures as tables, JSON and a picture."""

import asyncio
import os
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from wherry_cli.bench_arrivals import TraceError, arrivals, read_trace
from wherry_cli.bench_chart import Chart, Line, page
from wherry_cli.bench_flags import Failure, ServeFlags
from wherry_cli.bench_load import Plan, Test
from wherry_cli.bench_stats import Outcome, Slo, Spread, Summary, slices, spread, summarize
from wherry_cli.bench_workloads import (
    Conversation,
    Kind,
    Lengths,
    PromptsError,
    bounded,
    made_up,
    of_file,
    of_trace,
    round_robin,
)
from wherry_cli.openai_client import Client, ServerError

DEFAULT_REQUESTS = 100
LATE_S = 0.05  # of the generator: beyond, the figures say more about it than about the server


class Report(msgspec.Struct, kw_only=True):
    """Everything that `--json` writes."""

    settings: dict[str, Any]
    summary: Summary
    unfinished: int
    requests: list[dict[str, Any]]


def lengths_of(flags: ServeFlags) -> Lengths:
    """The lengths of what is made up."""
    return Lengths(
        input_tokens=flags.input_tokens,
        output_tokens=flags.output_tokens,
        spread=flags.length_spread,
        prefixes=flags.prefixes,
        prefix_tokens=flags.prefix_tokens,
        prefix_skew=flags.prefix_skew,
        turns=flags.turns,
        think_s=flags.think,
    )


def slo_of(flags: ServeFlags) -> Slo:
    """What a good answer keeps."""
    return Slo(*(None if ms is None else ms / 1e3 for ms in (flags.slo_ttft_ms, flags.slo_itl_ms)))


def make_plan(settings: ServeFlags) -> Plan:
    """Reads files, and asks the server for its model where none was named.

    Raises:
        Failure: a file cannot be used, the server cannot be reached, or options do not go together.
    """
    key = os.environ.get(settings.api_key_env) or None
    if settings.file is None and settings.workload in ("file", "trace"):
        raise Failure(f"--workload {settings.workload} reads a file: name it with --file")
    if settings.file is not None and settings.workload not in ("file", "trace"):
        raise Failure("--file is read with --workload file or --workload trace")
    requests = settings.requests
    if requests is None and settings.duration is None and settings.workload != "trace":
        requests = DEFAULT_REQUESTS
    try:
        times, conversations, known = _load(settings)
        served = Client(settings.url, key, timeout_s=10).models()
    except (TraceError, PromptsError, ServerError) as error:
        raise Failure(str(error)) from None
    if settings.model and settings.model not in served:
        raise Failure(f"{settings.url} serves {', '.join(served) or 'nothing'}, not {settings.model}")
    if not served:
        raise Failure(f"{settings.url} serves no model")
    total = None if settings.duration is not None else min(filter(None, (requests, known)), default=None)
    return Plan(
        url=settings.url,
        model=settings.model or served[0],
        api=settings.api,
        api_key=key,
        arrivals=times,
        conversations=bounded(conversations, requests),
        total=total,
        duration_s=settings.duration,
        timeout_s=settings.timeout,
        seed=settings.seed,
        options={"ignore_eos": True} if settings.ignore_eos else {},
    )


def _load(settings: ServeFlags) -> tuple[Any, Any, int | None]:
    """Arrival times, conversations, and how many there are if they end."""
    if settings.workload == "trace" and settings.file is not None:
        records = read_trace(settings.file, settings.trace_unit, settings.trace_speed)
        return [record.at_s for record in records], of_trace(records, settings.seed), len(records)
    times = arrivals(settings.arrival, settings.rate, settings.burst, settings.seed)
    if settings.workload == "file" and settings.file is not None:
        found: list[Conversation] = of_file(settings.file, settings.output_tokens)
        return times, round_robin(found), None
    kind: Kind = settings.workload  # type: ignore[assignment]
    return times, made_up(kind, lengths_of(settings), settings.seed), None


def run(settings: ServeFlags) -> tuple[Report, list[Outcome], bool]:
    """Runs the test: its report, every outcome, and whether it was interrupted.

    Raises:
        Failure: see `make_plan`.
    """
    plan = make_plan(settings)
    test = Test(plan)
    asyncio.run(test.run())
    outcomes = sorted(test.outcomes, key=lambda outcome: outcome.scheduled)
    rows = [{k: v for k, v in msgspec.structs.asdict(outcome).items() if k != "gaps"} for outcome in outcomes]
    told = msgspec.to_builtins(msgspec.structs.replace(settings, model=plan.model), enc_hook=str)
    report = Report(
        settings=told, summary=summarize(outcomes, slo_of(settings)), unfinished=test.unfinished, requests=rows
    )
    return report, outcomes, test.interrupted


def _ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:,.1f}"


def show(report: Report, flags: ServeFlags) -> None:
    """Prints the tables."""
    console, slo = Console(highlight=False), slo_of(flags)
    summary = report.summary
    latency = Table("milliseconds", "mean", "p50", "p90", "p95", "p99", "highest", title="Latency of whole answers")
    rows: dict[str, Spread] = {
        "time to first token": summary.ttft,
        "between pieces of text": summary.itl,
        "per token, each answer's mean": summary.per_token,
        "whole answer": summary.e2e,
    }
    for name, value in rows.items():
        latency.add_row(name, _ms(value.mean), *map(_ms, value.percentiles.values()), _ms(value.highest))
    console.print(latency)
    cached = f" ({summary.cached_tokens / summary.prompt_tokens:.0%} cached)" if summary.cached_tokens else ""
    console.print(
        f"[bold]{summary.complete}[/] of {summary.sent} answers are whole, in {summary.seconds:.1f} s: "
        f"[bold]{summary.requests_per_s:.2f}[/] requests/s, [bold]{summary.output_tokens_per_s:,.0f}[/] tokens/s out, "
        f"{summary.prompt_tokens_per_s:,.0f} tokens/s in{cached}",
        soft_wrap=True,
    )
    limits = {"time to first token": slo.ttft_s, "per token": slo.itl_s}
    if told := ", ".join(f"{name} ≤ {s * 1e3:g} ms" for name, s in limits.items() if s is not None):
        console.print(f"Goodput ({told}): [bold]{summary.goodput_per_s:.2f}[/] requests/s, {summary.good_share:.1%}")
    for kind, number in summary.failures.items():
        console.print(f"[red]{number} failed[/]: {kind}")
    if report.unfinished:
        console.print(f"[yellow]{report.unfinished} had not ended when the test was interrupted.[/]")
    late = summary.late.percentiles["p99"]
    if late is not None and late > LATE_S:
        console.print(
            f"[yellow]The load generator sent 1% of its requests {late * 1e3:.0f} ms late or later; latencies count "
            "from when they were due, so they hold this. Use a lower rate, or more generators.[/]",
            soft_wrap=True,
        )


def _over_time(outcomes: list[Outcome]) -> list[Chart]:
    parts = [(part.at, [o for o in part.outcomes if not o.failure]) for part in slices(outcomes)]

    def line(values: list[tuple[float, list[float]]], scale: float) -> list[tuple[float, float, float, float]]:
        points = []
        for at, found in values:
            cuts = spread(found).percentiles
            p50, p99 = cuts["p50"], cuts["p99"]
            if p50 is not None and p99 is not None:
                points.append((round(at, 1), min(found) * scale, p50 * scale, p99 * scale))
        return points

    first = line([(at, [o.ttft for o in whole if o.ttft is not None]) for at, whole in parts], 1e3)
    gaps = line([(at, [gap for o in whole for gap in o.gaps]) for at, whole in parts], 1e3)
    whole_s = line([(at, [o.end - o.scheduled for o in whole]) for at, whole in parts], 1)
    when, name = "seconds of the test", "lowest, median, p99"
    return [
        Chart("Time to first token", when, "ms", [Line(name, first)], log_x=False),
        Chart("Between pieces of text", when, "ms", [Line(name, gaps)], log_x=False),
        Chart("Whole answer", when, "s", [Line(name, whole_s)], log_x=False),
    ]


def save(report: Report, outcomes: list[Outcome], json: Path | None, plot: Path | None) -> None:
    """Writes the files that were asked for."""
    if json:
        json.write_bytes(msgspec.json.format(msgspec.json.encode(report), indent=1) + b"\n")
    if plot:
        plot.write_text(page(_over_time(outcomes)))
