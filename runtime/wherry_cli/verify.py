"""`wherry verify MODEL`: whether a model's files are whole."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from wherry_cli.model_files import TROUBLE, bar, console, explained, size
from wherry_runtime.formats.inspection import inspect, total_bytes
from wherry_runtime.formats.inspection import verify as problems_of

out = Console(highlight=False)


def verify(
    model: Annotated[Path, typer.Argument(help="A GGUF or safetensors file, or a directory with a model.")],
) -> None:
    """Check that a model's files are whole: their structure, the index, and the SHA-256 of each tensor where recorded.

    `wherry convert` records them. Exits with 1 if anything is wrong.
    """
    with explained():
        files = inspect(model)
        with bar("Checking", total_bytes(files)) as progress:
            problems = list(problems_of(model, files, progress))
    for problem in problems:
        console.print(f"[red]✗[/] {escape(problem)}", soft_wrap=True)
    if problems:
        raise typer.Exit(TROUBLE)
    for file in files:
        sums = f"{len(file.sums)} checksums hold" if file.sums else "no checksums are recorded"
        read = size(sum(t.nbytes for t in file.tensors))
        out.print(
            f"[green]✓[/] {escape(str(file.path))}: {file.format}, {len(file.tensors)} tensors, {read}; {sums}",
            soft_wrap=True,
        )


app = verify
