"""A command's options from a struct that declares them: each field is one, with its description, bounds and default."""

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

import msgspec
import typer

Flags = TypeVar("Flags", bound=msgspec.Struct)


def _parameter(field: Any, kind: Any) -> inspect.Parameter:
    type_, meta = get_args(kind)[:2]
    text = f"{meta.description}."
    bounds = {name: bound for name, bound in (("min", meta.ge), ("max", meta.le)) if bound is not None}
    option: Any = Annotated[type_, typer.Option(help=text[0].upper() + text[1:], **bounds)]
    return inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=field.default, annotation=option)


def with_struct(struct: type[Flags]) -> Callable[[Callable[[Flags], None]], Callable[..., None]]:
    """Decorates `command(flags)`: Typer sees an option for each field of `struct`. Every field has a default, and is
    `Annotated` with `msgspec.Meta(description=…, ge=…, le=…)`."""
    hints = get_type_hints(struct, include_extras=True)
    parameters = [_parameter(field, hints[field.name]) for field in msgspec.structs.fields(struct)]

    def decorate(function: Callable[[Flags], None]) -> Callable[..., None]:
        def command(**arguments: Any) -> None:
            for name, value in arguments.items():
                if isinstance(value, float) and not math.isfinite(value):  # within no bounds, and beyond none
                    raise typer.BadParameter("give a finite number", param_hint=f"--{name.replace('_', '-')}")
            function(struct(**arguments))

        command.__doc__ = function.__doc__
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return command

    return decorate
