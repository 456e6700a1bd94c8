"""`wherry chat`: a small chat in the terminal, against any endpoint that speaks the OpenAI API."""

import os
import sys
from contextlib import closing, suppress
from typing import Annotated, Any

import typer
from rich.console import Console

from wherry_cli.openai_client import Client, ServerError

_console = Console(highlight=False)
_errors = Console(stderr=True, highlight=False)
_HELP = "/reset forgets the conversation, /exit (or Ctrl-D) leaves, Ctrl-C stops an answer."


class Conversation:
    """The turns so far, and how the next answer is to be drawn."""

    def __init__(self, client: Client, model: str, system: str | None, options: dict[str, Any]) -> None:
        self._client = client
        self._options = {"model": model, **options}
        self._system = [{"role": "system", "content": system}] if system else []
        self._turns: list[dict[str, str]] = []

    def reset(self) -> None:
        """Forgets every turn."""
        self._turns.clear()

    def ask(self, question: str) -> None:
        """Prints the answer as it comes. Ctrl-C ends it; what came by then stays in the conversation.

        Raises:
            ServerError: there is no answer, or not all of it; the question is forgotten.
        """
        turns = [*self._turns, {"role": "user", "content": question}]
        answer = []
        try:
            with closing(self._client.chat({**self._options, "messages": [*self._system, *turns]})) as pieces:  # type: ignore[type-var]
                for piece in pieces:
                    answer.append(piece)
                    _console.out(piece, end="")
        except KeyboardInterrupt:
            _console.print(" [dim](stopped)[/]", end="")
        finally:
            _console.print()
        self._turns = [*turns, {"role": "assistant", "content": "".join(answer)}]


def _talk(conversation: Conversation) -> None:
    with suppress(ImportError):
        import readline  # noqa: F401 - gives input() line editing and history
    _console.print(f"[dim]{_HELP}[/]")
    while True:
        try:
            question = _console.input("[bold cyan]you>[/] ").strip()
        except KeyboardInterrupt:
            _console.print(f"\n[dim]{_HELP}[/]")
            continue
        except EOFError:
            _console.print()
            return
        if question == "/exit":
            return
        if question == "/reset":
            conversation.reset()
            _console.print("[dim]The conversation is forgotten.[/]")
        elif question.startswith("/"):
            _console.print(f"[dim]{_HELP}[/]")
        elif question:
            try:
                conversation.ask(question)
            except ServerError as error:
                _errors.print(f"[red]{error}[/]", markup=True)


def app(
    url: Annotated[str, typer.Option(help="The server's URL.")] = "http://127.0.0.1:8080",
    model: Annotated[str, typer.Option(help="Model to ask for; default: the first that is served.")] = "",
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 is greedy.", min=0, max=2)] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Tokens of an answer at most.", min=1)] = None,
) -> None:
    """Chat with a model in the terminal. Piped input is one question. $WHERRY_API_KEY is sent where it is set."""
    options = {"temperature": temperature, "max_completion_tokens": max_tokens}
    options = {name: value for name, value in options.items() if value is not None}
    try:
        client = Client(url, os.environ.get("WHERRY_API_KEY"))
        served = [model] if model else client.models()
        if not served:
            raise ServerError(f"{url} serves no model")  # noqa: TRY301
        conversation = Conversation(client, served[0], system, options)
        if sys.stdin.isatty():
            _console.print(f"[bold]{served[0]}[/] at {url}")
            _talk(conversation)
        elif question := sys.stdin.read().strip():
            conversation.ask(question)
        else:
            raise ServerError("there is no question on standard input")  # noqa: TRY301
    except ServerError as error:
        sys.stderr.write(f"wherry chat: {error}\n")
        raise typer.Exit(1) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
