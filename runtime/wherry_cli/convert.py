"""`wherry convert SRC DST`: a model from one format into another."""

import math
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from wherry_cli.model_files import bar, console, explained
from wherry_runtime.formats.conversion.source import SourceTensor, open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.conversion.to_safetensors import to_safetensors
from wherry_runtime.formats.gguf.types import GGMLType, type_named
from wherry_runtime.loading.errors import ModelError


def convert(
    src: Annotated[Path, typer.Argument(help="A directory with safetensors or GGUF, or a GGUF file.")],
    dst: Annotated[Path, typer.Argument(help="What to make: a file for GGUF, a directory for safetensors.")],
    to: Annotated[str, typer.Option(help="gguf or safetensors; by default what DST ends in .gguf or not.")] = "",
    type_: Annotated[
        str, typer.Option("--type", help="Of matrices: F32, F16, BF16; GGUF also Q8_0, Q6_K, Q5_K, Q5_0, Q4_K, Q4_0.")
    ] = "",
    torch_bin: Annotated[
        bool, typer.Option("--allow-pickle", help="Read PyTorch .bin files, tensors alone. Only where you trust them.")
    ] = False,
) -> None:
    """Convert a model between safetensors and GGUF, with its configuration, tokenizer and chat template.

    Without --type matrices stay in the type they are in, bit for bit; what is quantized becomes BF16 in safetensors.
    DST appears when it is whole. Each tensor's SHA-256 is recorded in it: see `wherry verify`.
    """
    with explained():
        to = to or ("gguf" if dst.suffix == ".gguf" else "safetensors")
        if to not in ("gguf", "safetensors"):
            raise ModelError("unknown_format", f"--to {to}: gguf or safetensors")
        wanted = type_named(type_) if type_ else None
        source = open_source(src, torch_bin=torch_bin)
        write = to_gguf if to == "gguf" else to_safetensors
        with bar("Converting", _bytes(source.tensors, wanted)) as progress:
            types = write(source, dst, wanted, progress)
    summary = ", ".join(f"{count} {name}" for name, count in types.items())
    console.print(f"[green]✓[/] {escape(str(dst))}: {summary} tensors", soft_wrap=True)


app = convert


def _bytes(tensors: list[SourceTensor], wanted: GGMLType | None) -> int:
    """About as many as will be written."""
    kinds = [(t.shape, wanted or t.type) for t in tensors]
    return sum(math.prod(shape) * kind.size // kind.block for shape, kind in kinds)
