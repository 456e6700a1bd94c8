"""`wherry bench`: how fast the engine is on this machine, and what a server does under load."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from wherry_cli.bench_flags import Failure, ServeFlags
from wherry_cli.engine_flags import with_engine_flags
from wherry_cli.serve import Failure as ModelFailure
from wherry_cli.serve import model_uri
from wherry_cli.struct_flags import with_struct
from wherry_protocol.engine_config import WORKER_ONLY

app = typer.Typer(help="Measure engines and servers.", no_args_is_help=True, add_completion=False)

# Settings of a server, which a measurement has none of, or which `bench` decides itself.
NOT_FLAGS = ("model_name", "model_uri", "host", "port", "drain_timeout_s", "max_queued", "max_running", *WORKER_ONLY)


@app.callback()
def bench() -> None:
    """Measure how fast models run on this machine, and what a server does under load."""


def numbers(text: str) -> list[int]:
    """`"1,4,16"` → [1, 4, 16], in ascending order.

    Raises:
        Failure: not a list of positive numbers.
    """
    try:
        found = sorted({int(part) for part in text.split(",") if part.strip()})
    except ValueError:
        found = []
    if not found or found[0] < 1:
        raise Failure(f"{text!r} is not a list of positive numbers such as 1,4,16")
    return found


def check_plot(plot: Path | None) -> None:
    """Raises Failure before minutes of measuring rather than after."""
    for file in (plot,) if plot else ():
        if file.suffix != ".svg":
            raise Failure(f"--plot writes SVG: name it {file.with_suffix('.svg')}")


def check_model(model: str) -> None:
    """Raises Failure before seconds of importing the engine rather than after."""
    try:
        model_uri(model)
    except ModelFailure as error:
        raise Failure(str(error)) from None


@app.command("engine")
@with_engine_flags(*NOT_FLAGS)
def engine_command(
    model: Annotated[str, typer.Argument(help="A model's directory, or sample://tiny.")],
    batch: Annotated[str, typer.Option(help="Requests at a time to decode with.")] = "1,2,4,8,16,32",
    prompt_tokens: Annotated[
        str, typer.Option(help="Prompt lengths for the time to the first token.")
    ] = "128,512,1024",
    context: Annotated[int, typer.Option(help="Prompt tokens of each request that decodes.", min=1)] = 128,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each request decodes.", min=8)] = 64,
    runs: Annotated[int, typer.Option(help="Times that everything is measured.", min=1)] = 3,
    json: Annotated[Path | None, typer.Option(help="Write the figures to this file.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the figures into this SVG file.")] = None,
    prefix_cache: Annotated[
        bool,
        typer.Option(help="Reuse the KV cache of equal prefixes; prompts here have none.", rich_help_panel="Engine"),
    ] = False,
    **settings: Any,
) -> None:
    """Latency and throughput of one model: time to the first token, decoding by batch size, share of memory bandwidth,
    memory. Through the engine as a server uses it, greedy, random prompts; the end of sequence is ignored."""
    try:
        check_plot(plot)
        batches, lengths = numbers(batch), numbers(prompt_tokens)
        check_model(model)

        from wherry_cli.bench_engine import Plan, run  # the engine takes seconds to import
        from wherry_cli.bench_report import save, show

        plan = Plan(
            model=model,
            batches=batches,
            prompt_tokens=lengths,
            context=context,
            new_tokens=new_tokens,
            runs=runs,
            settings={"prefix_cache": prefix_cache, **settings},
        )
        report = run(plan)
    except Failure as error:
        sys.stderr.write(f"wherry bench engine: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    show(report)
    save(report, json, plot)


@app.command("serve")
@with_struct(ServeFlags)
def serve_command(flags: ServeFlags) -> None:
    """What a server does under load: requests come when they are due, whether or not earlier ones were answered.

    Any server that speaks the OpenAI API with streaming. Latencies count from when a request was due. Ctrl-C ends the
    test with the table of what was measured so far.
    """
    from wherry_cli.bench_serve import run, save, show

    try:
        check_plot(flags.plot)
        report, outcomes, interrupted = run(flags)
    except Failure as error:
        sys.stderr.write(f"wherry bench serve: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    show(report, flags)
    save(report, outcomes, flags.json, flags.plot)
    if interrupted:
        raise typer.Exit(130)
