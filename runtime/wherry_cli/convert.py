"""`wherry convert SRC DST`: a model from one format into another."""

import math
import re
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
    split_size: Annotated[
        str, typer.Option(help="Of GGUF: bytes of tensors in a file, such as 4G or 500M, after which there is another.")
    ] = "",
    torch_bin: Annotated[
        bool, typer.Option("--allow-pickle", help="Read PyTorch .bin files, tensors alone. Only where you trust them.")
    ] = False,
) -> None:
    """Convert a model between safetensors and GGUF, with its configuration, tokenizer and chat template.

    Without --type matrices stay in the type they are in, bit for bit; what is quantized becomes BF16 in safetensors.
    DST appears when it is whole; with --split-size its parts do, the first one last, each called as llama.cpp has it
    (DST-00001-of-00003.gguf), unless all fits into one. Each tensor's SHA-256 is recorded in it: see `wherry verify`.
    """
    with explained():
        to = to or ("gguf" if dst.suffix == ".gguf" else "safetensors")
        if to not in ("gguf", "safetensors"):
            raise ModelError("unknown_format", f"--to {to}: gguf or safetensors")
        wanted = type_named(type_) if type_ else None
        source = open_source(src, torch_bin=torch_bin)
        if split_size and to != "gguf":
            raise ModelError("bad_size", "--split-size is of GGUF files")
        part_size = _size(split_size)
        with bar("Converting", _bytes(source.tensors, wanted)) as progress:
            if to == "gguf":
                types = to_gguf(source, dst, wanted, progress, part_size)
            else:
                types = to_safetensors(source, dst, wanted, progress)
    summary = ", ".join(f"{count} {name}" for name, count in types.items())
    console.print(f"[green]✓[/] {escape(str(dst))}: {summary} tensors", soft_wrap=True)


app = convert


def _size(text: str) -> int:
    """`4G`, in bytes as llama.cpp's gguf-split counts them; 0 for nothing."""
    match = re.fullmatch(r"([1-9]\d{0,5})([MG])", text)
    if text and match is None:
        raise ModelError("bad_size", f"--split-size {text}: a number of M or G is expected, such as 4G or 500M")
    return int(match[1]) * {"M": 10**6, "G": 10**9}[match[2]] if match else 0


def _bytes(tensors: list[SourceTensor], wanted: GGMLType | None) -> int:
    """About as many as will be written."""
    kinds = [(t.shape, wanted or t.type) for t in tensors]
    return sum(math.prod(shape) * kind.size // kind.block for shape, kind in kinds)
