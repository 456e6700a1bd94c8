"""Layers that are archives, as of ModelPack's packed layers and of container images with a /models directory.

An archive has been checked against its digest before, which says that it is the publisher's, and not that it means
well: names are checked as those of files are, links are not followed but refused, and there has to be room for each
file.
"""

import os
import tarfile
import threading
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import IO, NoReturn

from wherry_runtime.sources.http import stopped
from wherry_runtime.sources.store import MAX_FILES, check_names
from wherry_runtime.sources.transfer import CHUNK, disk_errors, need_room
from wherry_runtime.sources.types import Listing, RemoteFile, Request, TransferError

WHITEOUT = ".wh."


def unpack(archives: Mapping[str, str], directory: Path, stop: threading.Event) -> list[str]:
    """Takes the files out of archives in `directory`, and removes these. Names of the files that came out.

    Args:
        archives: by path in `directory`, in order, the directory inside each that is the model's; empty: all of it.

    Raises:
        TransferError: an archive is broken or does not mean well, or there is no room.
    """
    found: dict[str, None] = {}
    for path, inside in archives.items():
        try:
            with tarfile.open(directory / path, "r|*") as archive:
                for member in archive:
                    if name := _name(member, inside):
                        _write(archive.extractfile(member), member.size, directory, name, stop)
                        found[name] = None
                    if len(found) > MAX_FILES:
                        _too_many()
        except (tarfile.TarError, EOFError, zlib.error) as error:
            raise TransferError("corrupt_download", f"{path}: no archive that can be read ({error})") from None
        with disk_errors(directory):
            (directory / path).unlink()
    return list(found)


def _too_many() -> NoReturn:
    raise TransferError("too_large", f"over {MAX_FILES} files are in the archives")


def _name(member: tarfile.TarInfo, inside: str) -> str:
    """What the file is called in the model; empty where it is not of it.

    Raises:
        TransferError: it is of the model, and no plain file with a plain name.
    """
    parts = [part for part in PurePosixPath(member.name).parts if part != "."]
    if inside:
        if parts[:1] != [inside]:
            return ""
        parts = parts[1:]
    name = "/".join(parts)
    if not parts or member.isdir():
        return ""
    if not member.isfile() or parts[-1].startswith(WHITEOUT):
        raise TransferError("unsupported_format", f"{member.name[:200]!r} in an archive is no plain file")
    check_names(Listing("", (RemoteFile(name, member.size, None, lambda: Request("")),)))
    return name


def _write(source: IO[bytes] | None, size: int, directory: Path, name: str, stop: threading.Event) -> None:
    if source is None:
        raise TransferError("corrupt_download", f"{name}: the archive holds nothing of it")
    need_room(directory, size)
    with disk_errors(directory / name):
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        with (directory / name).open("wb") as out:
            while chunk := source.read(CHUNK):
                if stop.is_set():
                    raise stopped()
                out.write(chunk)
            out.flush()
            os.fsync(out.fileno())
