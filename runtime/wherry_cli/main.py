"""`wherry`: one command, its sub-commands imported when they are called.

`wherry --help` must answer at once, so it reads the table below and imports none of them.
"""

import importlib
import sys
from typing import Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup


class Entry(NamedTuple):
    """Where a sub-command lives: `module` has `app`, a Typer app or a function with Typer's annotations."""

    module: str
    summary: str
    extra: str


COMMANDS = {
    "serve": Entry("wherry_cli.serve", "Serve one model over the OpenAI API, in this process.", "runtime,router"),
    "chat": Entry("wherry_cli.chat", "Chat with a model in the terminal.", ""),
    "pull": Entry("wherry_cli.pull", "Download a model into the cache.", "runtime"),
    "cache": Entry("wherry_cli.cache", "Show and remove downloaded models.", "runtime"),
    "bench": Entry(
        "wherry_cli.bench", "Measure how fast a model runs here, or what a server does under load.", "runtime,router"
    ),
    "eval": Entry("wherry_cli.eval", "Measure a model's quality on a text.", "runtime,router"),
    "quantize": Entry("wherry_cli.quantize", "Write a checkpoint with fewer bits.", "runtime,router"),
    "simulate": Entry("wherry_cli.simulate", "Run workers without a model, to study routing.", "runtime,router"),
    "plan": Entry("wherry_cli.plan", "Show what an LLMDeployment would change, and why.", "operator"),
    "inspect": Entry("wherry_cli.inspect", "Show what is in a model's files.", "runtime"),
    "convert": Entry("wherry_cli.convert", "Convert a model between safetensors and GGUF.", "runtime"),
    "verify": Entry("wherry_cli.verify", "Check a model's files, and the checksums recorded in them.", "runtime"),
    "keys": Entry("wherry_cli.keys", "Make API keys for the router.", ""),
    "local": Entry("wherry_cli.local", "Run a real Kubernetes control plane on this machine.", "local"),
    "version": Entry("wherry_cli.version", "Print the version.", ""),
}


def load_command(name: str) -> Any:
    """The command called `name`, imported."""
    entry = COMMANDS[name]
    try:
        target = importlib.import_module(entry.module).app
    except ModuleNotFoundError as error:
        hint = f"; install it with: pip install 'wherry[{entry.extra}]'" if entry.extra else ""
        sys.stderr.write(f"wherry {name} needs the Python package {error.name!r}{hint}\n")
        raise SystemExit(1) from None
    if not isinstance(target, typer.Typer):
        function, target = target, typer.Typer(add_completion=False)
        target.command(name)(function)
    target.info.name = name
    return typer.main.get_command(target)


class LazyGroup(TyperGroup):
    """Lists from the table; imports what is called."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The table's order."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """A stand-in that has the summary only."""
        if cmd_name not in COMMANDS:
            return None
        return TyperCommand(cmd_name, help=COMMANDS[cmd_name].summary)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        """The real one."""
        name, command, rest = super().resolve_command(ctx, args)
        if name is not None and command is not None:
            command = load_command(name)
        return name, command, rest


app = typer.Typer(cls=LazyGroup, no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)


@app.callback()
def wherry() -> None:
    """Runs large language models: on Kubernetes, or here."""


def main() -> None:
    """The entry point."""
    app(prog_name="wherry")


if __name__ == "__main__":
    main()
