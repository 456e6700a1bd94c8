"""`wherry inspect MODEL`: what is in a model's files."""

import json
import math
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from wherry_cli.model_files import explained, size
from wherry_runtime.formats.gguf.blocks.parts import HELD
from wherry_runtime.formats.inspection import File, as_json, inspect, shown, total_bytes

out = Console(highlight=False)
_LONGEST = 100  # characters of a value that are shown


def inspect_model(
    model: Annotated[Path, typer.Argument(help="A GGUF or safetensors file, or a directory with a model.")],
    as_json_: Annotated[bool, typer.Option("--json", help="Everything, for programs.")] = False,
    tensors: Annotated[bool, typer.Option(help="List the tensors.")] = True,
) -> None:
    """Show a model's format, metadata and tensors. Headers are read and checked, tensors are not.

    The format is told from the content, whatever the name. `wherry verify` checks the tensors, too.
    """
    with explained():
        files = inspect(model)
    if as_json_:
        sys.stdout.write(json.dumps(as_json(files), indent=2) + "\n")
        return
    for file in files:
        _show(file, tensors=tensors)
    if len(files) > 1:
        out.print(f"{len(files)} files, {size(total_bytes(files))}")


app = inspect_model


def _show(file: File, *, tensors: bool) -> None:
    weights = sum(math.prod(t.shape) for t in file.tensors)
    sums = f", {len(file.sums)} checksums" if file.sums else ""
    nbytes = sum(t.nbytes for t in file.tensors)
    out.print(
        f"[bold]{escape(str(file.path))}[/] {file.format}: {len(file.tensors)} tensors, {weights:,} weights, "
        f"{size(nbytes)}" + (f", {8 * nbytes / weights:.2f} bits each" if weights else "") + sums,
        soft_wrap=True,
    )
    out.print(_types(file))
    if file.metadata:
        out.print(_metadata(file))
    if tensors and file.tensors:
        out.print(_tensors(file))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim", padding=(0, 2, 0, 0))
    for column in columns:
        table.add_column(column, justify="right" if column in ("tensors", "size") else "left", overflow="fold")
    return table


def _types(file: File) -> Table:
    """Of GGUF files also how matrices in blocks are held on the native kernels."""
    blocks = file.format.startswith("GGUF")
    table = _table("type", "tensors", "size", *(["held as"] if blocks else []))
    for name in sorted({t.type for t in file.tensors}):
        of = [t for t in file.tensors if t.type == name]
        held = str(HELD.get(name, "floats"))
        table.add_row(name, str(len(of)), size(sum(t.nbytes for t in of)), *([held] if blocks else []))
    return table


def _metadata(file: File) -> Table:
    table = _table("key", "value")
    for key, value in file.metadata.items():
        text = json.dumps(shown(value), ensure_ascii=False)
        table.add_row(escape(key), escape(text if len(text) <= _LONGEST else text[:_LONGEST] + "…"))
    return table


def _tensors(file: File) -> Table:
    table = _table("tensor", "type", "shape", "size")
    for t in file.tensors:
        table.add_row(escape(t.name), t.type, " × ".join(map(str, t.shape)), size(t.nbytes))
    return table
