"""Files that may change while a program runs: volumes with Secrets, which kubelets exchange as a whole.

What is read must have stayed the same from one look to the next, and while it was read: a file that somebody is just
writing is not taken. What cannot be used changes nothing: the last good content stays.
"""

import asyncio
import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Generic, TypeVar

log = logging.getLogger("wherry.files")
T = TypeVar("T")

POLL_S = 1.0
# Files that could not be used and have not changed are read again at every so many looks.
RETRY_LOOKS = 30
MAX_BYTES = 1 << 20
MAX_FILES = 20_000
Fingerprint = tuple[tuple[str, int, int, int], ...]


class FilesError(Exception):
    """The files cannot be read. The message says which, and why."""


def listed(path: Path) -> list[Path]:
    """The file itself, or the files in the directory by name; names with a dot in front are the kubelet's own.

    Raises:
        FilesError: it is not there, or holds too many.
    """
    try:
        if not path.is_dir():
            path.stat()
            return [path]
        found = sorted(p for p in path.iterdir() if not p.name.startswith(".") and p.is_file())
    except OSError as error:
        raise FilesError(f"{path}: {error.strerror}") from None
    if len(found) > MAX_FILES:
        raise FilesError(f"{path}: more than {MAX_FILES} files")
    return found


def read(path: Path) -> bytes:
    """A file's content.

    Raises:
        FilesError: it cannot be read, or is larger than 1 MiB.
    """
    try:
        with path.open("rb") as file:
            content = file.read(MAX_BYTES + 1)
    except OSError as error:
        raise FilesError(f"{path}: {error.strerror}") from None
    if len(content) > MAX_BYTES:
        raise FilesError(f"{path}: larger than {MAX_BYTES} bytes")
    return content


def fingerprint(paths: Sequence[Path]) -> Fingerprint:
    """Changes whenever a file does. What is not there has none."""
    found = []
    for path in paths:
        try:
            for file in listed(path):
                stat = os.stat(file)
                found.append((str(file), stat.st_mtime_ns, stat.st_size, stat.st_ino))
        except (FilesError, OSError):
            continue
    return tuple(found)


class Watched(Generic[T]):
    """Keeps what `load` makes of the files at `paths`, and gives it to `use` whenever it changed.

    `load` raises one of `errors` where the files cannot be used, and `problem` says then why; None: they are in use.
    """

    def __init__(
        self,
        what: str,
        paths: Sequence[Path],
        load: Callable[[], T],
        use: Callable[[T], None],
        errors: tuple[type[Exception], ...],
    ) -> None:
        self._what = what
        self._paths = tuple(paths)
        self._load = load
        self._use = use
        self._errors: tuple[type[Exception], ...] = (FilesError, *errors)
        self._used: Fingerprint | None = None
        self._seen: Fingerprint | None = None
        self._wrong: Fingerprint | None = None
        self._wait = 0
        self.problem: str | None = None

    @property
    def loaded(self) -> bool:
        """Whether files were good once."""
        return self._used is not None

    def start(self) -> None:
        """The first look. What cannot be used is noted in `problem`, and looked at again later."""
        self._take(fingerprint(self._paths))

    def look(self) -> None:
        """One of many looks."""
        now = fingerprint(self._paths)
        settled, self._seen = now == self._seen, now
        if now == self._used or not settled:
            return
        # Reading what is wrong is as much work as reading what is right, and it seldom mends itself unchanged.
        self._wait = self._wait - 1 if now == self._wrong else 0
        if self._wait <= 0:
            self._take(now)

    async def run(self) -> None:
        """Looks for ever. A file system that hangs holds up this task only."""
        while True:
            await asyncio.sleep(POLL_S)
            await asyncio.to_thread(self.look)

    def _take(self, now: Fingerprint) -> None:
        try:
            value = self._load()
        except self._errors as error:
            self._wrong, self._wait = now, RETRY_LOOKS
            self._complain(str(error))
            return
        if fingerprint(self._paths) != now:
            return
        again = self._used is not None
        self._use(value)
        self._used, self._wrong, self.problem = now, None, None
        log.info(f"{self._what} read", extra={"fields": {"again": again}})

    def _complain(self, message: str) -> None:
        if message == self.problem:
            return
        self.problem = message
        kept = "none so far" if self._used is None else "the last good ones stay in use"
        log.error(f"{self._what} cannot be used; {kept}", extra={"fields": {"why": message}})
