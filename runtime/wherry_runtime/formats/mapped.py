"""Files that are read through a memory map."""

import mmap
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from wherry_runtime.loading.errors import ModelError

Header = TypeVar("Header")


def open_mapped(path: Path, empty: str, parse: Callable[[mmap.mmap, int], Header]) -> tuple[Header, mmap.mmap]:
    """What `parse` makes of the map and the size of a file, and the map.

    Args:
        empty: the code of the error for a file without a byte.

    Raises:
        ModelError: unreadable_file, `empty`, or what `parse` raises, with the path.
    """
    try:
        with path.open("rb") as file:
            if not (size := file.seek(0, 2)):
                raise ModelError(empty, f"{path}: is empty")
            data = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
    except OSError as e:
        raise ModelError("unreadable_file", f"{path}: {e.strerror}") from e
    try:
        return parse(data, size), data
    except ModelError as e:
        raise ModelError(e.code, f"{path}: {e.message}; copy or download it again") from None
