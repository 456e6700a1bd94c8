"""What a file is, by what is in it and not by what it is called."""

import re
from pathlib import Path
from typing import Literal

from wherry_runtime.formats.safetensors.reader import LARGEST_HEADER
from wherry_runtime.loading.errors import ModelError

Kind = Literal["gguf", "safetensors", "torch", "unknown"]
_SPLIT = re.compile(r"^(.*)-(\d{5})-of-(\d{5})\.gguf$")


def kind_of(path: Path) -> Kind:
    """The format of a file, as its first bytes tell it. `torch` is a zip archive or a pickle.

    Raises:
        ModelError: unreadable_file.
    """
    try:
        with path.open("rb") as file:
            first = file.read(9)
    except OSError as e:
        raise ModelError("unreadable_file", f"{path}: {e.strerror}") from e
    if first[:4] == b"GGUF":
        return "gguf"
    if first[:4] == b"PK\x03\x04" or (first[:1] == b"\x80" and first[1:2] in b"\x02\x03\x04\x05"):
        return "torch"
    if first[8:9] == b"{" and 2 <= int.from_bytes(first[:8], "little") <= LARGEST_HEADER:
        return "safetensors"
    return "unknown"


def gguf_files(path: Path) -> list[Path]:
    """The GGUF files of the model at `path`, in order: a file, with the other parts of a split one, or a directory with
    one model. None: it is something else.

    Raises:
        ModelError: unreadable_file, missing_shard, or several_models for a directory that has more than one.
    """
    if path.is_file():
        return _parts(path) if kind_of(path) == "gguf" else []
    if not path.is_dir():
        return []
    found = [p for p in sorted(path.glob("*.gguf")) if p.is_file() and kind_of(p) == "gguf"]
    if not found:
        return []
    parts = _parts(found[0])
    if others := [p.name for p in found if p not in parts]:
        raise ModelError(
            "several_models", f"{path}: has several GGUF models; name one: {found[0].name}, {', '.join(others[:5])}"
        )
    return parts


def _parts(path: Path) -> list[Path]:
    match = _SPLIT.match(path.name)
    if match is None:
        return [path]
    stem, _, count = match.groups()
    parts = [path.with_name(f"{stem}-{i:05d}-of-{count}.gguf") for i in range(1, int(count) + 1)]
    for part in parts:
        if not part.is_file():
            raise ModelError("missing_shard", f"{part}: {path.name} is a part of {int(count)}, but it is not there")
    return parts
