"""The cache on disk: whole models, those that are on their way, and what names were last found to mean.

    ROOT/SOURCE/snapshots/REVISION/   a whole model: it got this name in one step, when every byte had been checked
    ROOT/SOURCE/partial/REVISION/     one on its way; `.part` is a file of which bytes are missing
    ROOT/SOURCE/refs/NAME.json        the revision that a name like `main` meant when the source was last asked
    ROOT/SOURCE/lock, lease.json      see `lock`

Both sides of a rename are in one directory tree, so on one volume. Files and directories are synced before it.
"""

import contextlib
import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherry_protocol.naming import ENV_MODEL_CACHE
from wherry_runtime.sources.transfer import disk_errors
from wherry_runtime.sources.types import Listing, Source, TransferError

RECORD = ".wherry.json"
MAX_FILES = 10_000
_ODD = re.compile(r"[^A-Za-z0-9._-]+")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


def cache_root(configured: str = "") -> Path:
    """Where downloaded models are: as `configured`, as the environment says, else in the user's cache."""
    named = configured or os.environ.get(ENV_MODEL_CACHE) or "~/.cache/wherry/models"
    return Path(named).expanduser()


def slug(text: str) -> str:
    """A file name for any text; two texts never get the same."""
    return f"{_ODD.sub('-', text).strip('-.')[:80]}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"


def check_names(listing: Listing) -> None:
    """Raises TransferError where a file's name leads anywhere but into the model's directory, or two are the same."""
    if not listing.files:
        raise TransferError("model_not_found", "there are no files of a model")
    if len(listing.files) > MAX_FILES:
        raise TransferError("too_large", f"there are {len(listing.files)} files; a model has {MAX_FILES} at most")
    seen = set()
    for file in listing.files:
        parts = file.path.split("/")
        bad = any(part in ("", ".", "..") or len(part.encode()) > 200 for part in parts)
        if bad or "\\" in file.path or _CONTROL.search(file.path) or parts[0] == RECORD or file.path in seen:
            raise TransferError("unsafe_name", f"{file.path[:200]!r} is no name for a file of a model, or there twice")
        seen.add(file.path)


@dataclass(frozen=True)
class Cached:
    """A whole model in the cache. `used`: Unix time of the last start with it."""

    directory: Path
    source: str
    reference: str
    revision: str
    entry: str
    size: int
    used: float

    @property
    def path(self) -> Path:
        """What the URI named: the directory, or a file in it."""
        return self.directory / self.entry if self.entry else self.directory


class Store:
    """The part of the cache that belongs to one source."""

    def __init__(self, root: Path, source: Source) -> None:
        self.directory = root / slug(source.identity)
        self._source = source

    def make(self) -> None:
        """Makes the directories.

        Raises:
            TransferError: they cannot be made.
        """
        with disk_errors(self.directory):
            for name in ("snapshots", "partial", "refs"):
                (self.directory / name).mkdir(parents=True, exist_ok=True)

    def _key(self, revision: str) -> str:
        # Two paths inside one revision are two models.
        _, _, inside = self._source.reference.partition("/")
        return slug(f"{revision}/{inside}") if inside else _ODD.sub("-", revision)[:120]

    def whole(self, revision: str) -> Cached | None:
        """The model of `revision`, if all of it is here."""
        return read(self.directory / "snapshots" / self._key(revision))

    def staging(self, revision: str) -> Path:
        """Where the model of `revision` is put together; with what is left of a snapshot that somebody damaged."""
        partial = self.directory / "partial" / self._key(revision)
        damaged = self.directory / "snapshots" / self._key(revision)
        with disk_errors(partial):
            if damaged.is_dir():
                shutil.rmtree(partial, ignore_errors=True)
                damaged.rename(partial)
                _forget_damaged(partial)
            partial.mkdir(parents=True, exist_ok=True)
        return partial

    def publish(self, listing: Listing) -> Cached:
        """Makes the model that was put together a whole one.

        Raises:
            TransferError: it cannot be renamed.
        """
        key = self._key(listing.revision)
        partial, final = self.directory / "partial" / key, self.directory / "snapshots" / key
        files = [
            {
                "path": file.path,
                "size": (partial / file.path).stat().st_size,
                **({file.checksum.algorithm: file.checksum.value} if file.checksum else {}),
            }
            for file in listing.files
        ]
        record = {
            "source": self._source.identity,
            "reference": self._source.reference,
            "revision": listing.revision,
            "entry": listing.entry,
            "files": files,
        }
        with disk_errors(final):
            _write(partial / RECORD, record)
            for directory in {partial, *((partial / file.path).parent for file in listing.files)}:
                _sync(directory)
            # Where locks do not hold on this volume, another one may have been faster.
            if (found := read(final)) is None:
                partial.rename(final)
            else:
                shutil.rmtree(partial, ignore_errors=True)
            _sync(final.parent)
        found = found or read(final)
        if found is None:
            raise TransferError("cache_unusable", f"{final}: what was just put there is not there")
        return found

    def remember(self, revision: str) -> None:
        """Notes what the URI's reference means now."""
        # A cache that cannot be written is still one that can be read.
        with contextlib.suppress(OSError):
            _write(self._ref(), {"revision": revision, "at": int(time.time())})
        with contextlib.suppress(OSError):
            os.utime(self.directory / "snapshots" / self._key(revision) / RECORD)

    def last(self) -> Cached | None:
        """The model that the URI's reference meant when the source was last asked, if it is here."""
        noted = _load(self._ref())
        revision = noted.get("revision")
        return self.whole(revision) if isinstance(revision, str) else None

    def _ref(self) -> Path:
        return self.directory / "refs" / f"{slug(self._source.reference)}.json"


def read(directory: Path) -> Cached | None:
    """The model in `directory`, if it is whole: every file there, with the size that it had."""
    record = _load(directory / RECORD)
    files = record.get("files")
    if not isinstance(files, list):
        return None
    try:
        if any((directory / file["path"]).stat().st_size != file["size"] for file in files):
            return None
        used = (directory / RECORD).stat().st_mtime
    except (OSError, TypeError, KeyError):
        return None
    size = sum(file["size"] for file in files)
    source, reference, revision, entry = (str(record.get(n, "")) for n in ("source", "reference", "revision", "entry"))
    return Cached(directory, source, reference, revision, entry, size, used)


def remove(model: Cached) -> None:
    """Takes a model out of the cache. Nobody sees a half of it."""
    gone = model.directory.parent.parent / "partial" / f"{model.directory.name}.removed"
    shutil.rmtree(gone, ignore_errors=True)
    model.directory.rename(gone)
    shutil.rmtree(gone)


def cached(root: Path) -> Iterator[Cached]:
    """Every whole model in the cache."""
    for directory in sorted(root.glob("*/snapshots/*")):
        if (found := read(directory)) is not None:
            yield found


def _forget_damaged(directory: Path) -> None:
    """Removes the files of what was a whole model that no longer have the size that they had."""
    for file in _load(directory / RECORD).get("files") or []:
        path = directory / file["path"]
        if path.is_file() and path.stat().st_size != file["size"]:
            path.unlink()


def _load(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _write(path: Path, value: dict[str, Any]) -> None:
    new = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    with new.open("w") as out:
        json.dump(value, out, indent=1)
        out.flush()
        os.fsync(out.fileno())
    new.rename(path)


def _sync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
