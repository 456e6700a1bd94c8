"""`wherry bench`: how fast the engine is on this machine."""

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
import typer

from wherry_protocol.engine_config import EngineConfig

app = typer.Typer(help="Measure how fast models run on this machine.", no_args_is_help=True, add_completion=False)

# Settings of a server, which a measurement has none of, or which `bench` decides itself.
NOT_FLAGS = {"model_name", "model_uri", "host", "port", "drain_timeout_s", "max_queued", "max_running"}


class Failure(Exception):
    """Something the user can mend. The message says what and how."""


@app.callback()
def bench() -> None:
    """Measure how fast models run on this machine."""


def engine_flags() -> list[inspect.Parameter]:
    """An option for each of the engine's settings that make a difference to its speed, with the engine's defaults."""
    hints = get_type_hints(EngineConfig, include_extras=True)
    parameters = []
    for field in msgspec.structs.fields(EngineConfig):
        if field.name in NOT_FLAGS:
            continue
        kind_of_value, meta = get_args(hints[field.name])[:2]
        text = f"{meta.description}."
        flag = typer.Option(help=text[0].upper() + text[1:], rich_help_panel="Engine")
        option: Any = Annotated[kind_of_value, flag]
        default = False if field.name == "prefix_cache" else field.default
        kind = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, kind, default=default, annotation=option))
    return parameters


def with_engine_flags(function: Callable[..., None]) -> Callable[..., None]:
    """`function(…, **settings)` with the engine's flags in the place of `settings`, as Typer reads signatures."""
    own = [p for p in inspect.signature(function).parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    flags = engine_flags()
    annotations = {p.name: p.annotation for p in [*own, *flags]}

    def command(**arguments: Any) -> None:
        function(**arguments)

    command.__doc__ = function.__doc__
    command.__annotations__ = annotations
    keyword = inspect.Parameter.KEYWORD_ONLY
    command.__signature__ = inspect.Signature([p.replace(kind=keyword) for p in own] + flags)  # type: ignore[attr-defined]
    return command


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


@app.command("engine")
@with_engine_flags
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
    **settings: Any,
) -> None:
    """Latency and throughput of one model: time to the first token, decoding by batch size, share of memory bandwidth,
    memory. Through the engine as a server uses it, greedy, random prompts; the end of sequence is ignored."""
    from wherry_cli.bench_engine import Plan, run  # the engine takes seconds to import
    from wherry_cli.bench_report import save, show

    try:
        check_plot(plot)
        plan = Plan(
            model=model,
            batches=numbers(batch),
            prompt_tokens=numbers(prompt_tokens),
            context=context,
            new_tokens=new_tokens,
            runs=runs,
            settings=settings,
        )
        report = run(plan)
    except Failure as error:
        sys.stderr.write(f"wherry bench engine: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    show(report)
    save(report, json, plot)
