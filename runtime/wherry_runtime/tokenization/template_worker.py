"""Renders chat templates in a process of its own. Started by `chat_template`; speaks JSON lines on stdin and stdout.

A template is a program from the model's directory. Jinja's sandbox keeps it from reaching anything, but not from
running for ever or filling memory, so it runs where it can be killed and where memory is limited.
"""

import json
import resource
import sys
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

MEMORY_LIMIT = 512 << 20


class RefusedError(Exception):
    """The template itself refused the messages (`raise_exception`)."""


def _raise_exception(message: object) -> NoReturn:
    raise RefusedError(str(message))


def _tojson(value: Any, ensure_ascii: bool = False, indent: int | None = None, **options: Any) -> str:
    """JSON as the templates of transformers expect it: without HTML escapes."""
    allowed = {k: v for k, v in options.items() if k in ("separators", "sort_keys")}
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, **allowed)


class _Generation(Extension):
    """`{% generation %}…{% endgeneration %}` marks the assistant's part for training; here it is its content."""

    tags = {"generation"}  # noqa: RUF012 - Jinja's declaration

    def parse(self, parser: jinja2.parser.Parser) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _Generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals.pop("lipsum", None)
    return environment


def _strftime_at(now: int) -> Callable[[str], str]:
    """`strftime_now` of templates, in the machine's time zone; `now` in Unix seconds, 0: when it is called."""

    def strftime_now(form: str) -> str:
        moment = datetime.fromtimestamp(now, UTC) if now else datetime.now(UTC)
        return moment.astimezone().strftime(form)

    return strftime_now


def _render(template: jinja2.Template, variables: dict[str, Any], limit: int) -> str:
    parts = []
    size = 0
    for part in template.generate(**variables):
        size += len(part)
        if size > limit:
            raise OverflowError
        parts.append(part)
    return "".join(parts)


def answer(template: jinja2.Template, request: dict[str, Any]) -> dict[str, str]:
    """{"text": …}, or {"error": kind, "message": …} with kind refused, too_long or broken."""
    try:
        variables = {"strftime_now": _strftime_at(request.get("now", 0)), **request["variables"]}
        return {"text": _render(template, variables, request["limit"])}
    except RefusedError as e:
        return {"error": "refused", "message": str(e)[:500]}
    except OverflowError:
        return {"error": "too_long", "message": f"the template's output passed {request['limit']} characters"}
    except MemoryError:
        return {"error": "too_long", "message": "the template asked for too much memory"}
    except Exception as e:
        return {"error": "broken", "message": f"{type(e).__name__}: {e}"[:500]}


def main() -> None:
    """The first line on stdin is the template as a JSON string, every further one a request."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_LIMIT, MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    source = json.loads(sys.stdin.buffer.readline())
    template: jinja2.Template | None = None
    problem = ""
    try:
        template = _environment().from_string(source)
    except Exception as e:
        problem = f"{type(e).__name__}: {e}"[:500]
    for line in sys.stdin.buffer:
        reply = {"error": "broken", "message": problem} if template is None else answer(template, json.loads(line))
        sys.stdout.buffer.write(json.dumps(reply).encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
