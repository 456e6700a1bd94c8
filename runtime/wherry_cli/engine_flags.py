"""The engine's settings as options of a command, from their one declaration in `EngineConfig`."""

import inspect
from collections.abc import Callable, Iterable
from typing import Annotated, Any, get_args, get_type_hints

import msgspec
import typer

from wherry_protocol.engine_config import EngineConfig


def engine_flags(leave_out: Iterable[str]) -> list[inspect.Parameter]:
    """An option for each setting that is not in `leave_out`, with the engine's default."""
    hints = get_type_hints(EngineConfig, include_extras=True)
    parameters = []
    for field in msgspec.structs.fields(EngineConfig):
        if field.name in leave_out:
            continue
        kind_of_value, meta = get_args(hints[field.name])[:2]
        text = f"{meta.description}."
        flag = typer.Option(help=text[0].upper() + text[1:], rich_help_panel="Engine")
        option: Any = Annotated[kind_of_value, flag]
        keyword = inspect.Parameter.KEYWORD_ONLY
        parameters.append(inspect.Parameter(field.name, keyword, default=field.default, annotation=option))
    return parameters


def with_engine_flags(*leave_out: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Decorates `command(…, **settings)`: the engine's flags take the place of `settings`, as Typer reads signatures.

    Settings that the command declares itself, with a default or help of its own, are not added again.
    """

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        declared = inspect.signature(function).parameters.values()
        own = [p for p in declared if p.kind is not inspect.Parameter.VAR_KEYWORD]
        flags = engine_flags({*leave_out, *(p.name for p in own)})

        def command(**arguments: Any) -> None:
            function(**arguments)

        command.__doc__ = function.__doc__
        command.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
        plain = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own]
        command.__signature__ = inspect.Signature(plain + flags)  # type: ignore[attr-defined]
        return command

    return decorate
