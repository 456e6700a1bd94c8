"""What the commands about model files share: errors as one line, and a progress bar."""

import contextlib
from collections.abc import Callable, Iterator

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from wherry_runtime.loading.errors import ModelError

TROUBLE = 1
console = Console(stderr=True, highlight=False)


@contextlib.contextmanager
def explained() -> Iterator[None]:
    """Ends the command with a line where a model is at fault, or the disk."""
    try:
        yield
    except ModelError as error:
        console.print(f"[red]error:[/] {escape(error.message)} [dim]({error.code})[/]", soft_wrap=True)
        raise typer.Exit(TROUBLE) from None
    except OSError as error:
        console.print(f"[red]error:[/] {escape(str(error))}", soft_wrap=True)
        raise typer.Exit(TROUBLE) from None


@contextlib.contextmanager
def bar(what: str, total: int) -> Iterator[Callable[[int], None]]:
    """A progress bar of `total` bytes on stderr, gone at the end; gives what to tell bytes to."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(
        *columns, TimeRemainingColumn(), console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(escape(what), total=total)
        yield lambda count: progress.advance(task, count)


def size(count: float) -> str:
    """Bytes for a person."""
    for unit in ("B", "KiB", "MiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.2f} GiB"
