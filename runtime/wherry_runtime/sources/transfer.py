"""One file: asked for from where it broke off, checked, and only then called by its name."""

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import urllib3

from wherry_runtime.sources.http import TRIES, Http, shown, stopped
from wherry_runtime.sources.progress import Download, size_text
from wherry_runtime.sources.types import RemoteFile, TransferError

CHUNK = 1 << 20
PARTIAL = ".part"
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Transfer:
    """A file on its way to `target`.

    Bytes are written where they belong, never appended: where two processes download the same revision, because the
    volume they share has no locks that hold, they write the same bytes to the same places.
    """

    def __init__(self, file: RemoteFile, target: Path, http: Http, progress: Download) -> None:
        self._file, self._target, self._http, self._progress = file, target, http, progress
        self._part = target.with_name(target.name + PARTIAL)
        self._at = 0  # bytes that are here, written and hashed
        self._hash: Any = None

    def run(self) -> None:
        """Downloads and checks the file, unless it is here.

        Raises:
            TransferError: it cannot be had; what came so far stays for the next try.
        """
        size = self._file.size
        if self._target.is_file() and size in (None, self._target.stat().st_size):
            self._progress.add(self._target.stat().st_size, found=True)
            return
        with disk_errors(self._target):
            self._target.parent.mkdir(parents=True, exist_ok=True)
            # Neither truncated nor appended to.
            descriptor = os.open(self._part, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            with os.fdopen(descriptor, "r+b", buffering=0) as out:
                self._recover(out)
                self._fill(out)
                try:
                    self._check(out)
                except TransferError:
                    # What had been here, or one bad answer of several, may be at fault. So once more, all of it.
                    self._fill(out)
                    self._check(out)
                os.fsync(out.fileno())
            self._part.rename(self._target)

    def _recover(self, out: BinaryIO) -> None:
        """Takes up what an earlier process left."""
        self._hash = self._file.checksum.hasher(self._file.size) if self._file.checksum else None
        while chunk := out.read(CHUNK):
            if self._http.stop.is_set():
                raise stopped()
            self._take(chunk, found=True)
        if self._file.size is not None and self._at > self._file.size:
            self._restart(out)

    def _restart(self, out: BinaryIO) -> None:
        self._progress.add(-self._at)
        out.truncate(0)
        self._at = 0
        self._hash = self._file.checksum.hasher(self._file.size) if self._file.checksum else None

    def _take(self, chunk: bytes, *, found: bool = False) -> None:
        self._at += len(chunk)
        if self._hash is not None:
            self._hash.update(chunk)
        self._progress.add(len(chunk), found=found)

    def _fill(self, out: BinaryIO) -> None:
        """Asks until every byte is here. A try that brought something starts the count of tries anew."""
        tried = 0
        while self._file.size is None or self._at < self._file.size:
            before = self._at
            try:
                if self._attempt(out):
                    return
                self._broke_off()
            except TransferError as error:
                tried = 1 if self._at > before else tried + 1
                if not error.retry or tried >= TRIES:
                    raise
                self._http.pause(error, tried)

    def _broke_off(self) -> NoReturn:
        text = f"{self._file.path}: the connection broke off after {self._at} bytes"
        raise TransferError("source_unreachable", text, retry=True, unreachable=True)

    def _attempt(self, out: BinaryIO) -> bool:
        """One request for what is missing. Whether the body came to its end."""
        request = self._file.request()
        extra = {"range": f"bytes={self._at}-"} if self._at else {}
        with self._http.once(request, extra, take=(200, 206, 416)) as response:
            if response.status == 416:
                # Nothing comes after what is here, or what is here is of something else. The checksum tells.
                if self._file.size is None and self._file.checksum is not None:
                    return True
                self._restart(out)
                raise TransferError("source_unreachable", f"{shown(request.url)}: 416, starting over", retry=True)
            if self._at and (response.status == 200 or _first(response) != self._at):
                self._restart(out)
                if response.status == 206:
                    raise TransferError("source_unreachable", f"{shown(request.url)}: another range came", retry=True)
            # What has come, not a whole chunk: a slow download shows its progress and ends when it is to.
            while chunk := response.read1(CHUNK):
                if self._http.stop.is_set():
                    raise stopped()
                if self._file.size is not None and self._at + len(chunk) > self._file.size:
                    raise TransferError(
                        "corrupt_download",
                        f"{self._file.path}: more bytes come than the {self._file.size} that it has",
                    )
                write_at(out, chunk, self._at)
                self._take(chunk)
            return self._at == self._file.size if self._file.size is not None else not _left(response)

    def _check(self, out: BinaryIO) -> None:
        """Raises TransferError and forgets the bytes where they are not the right ones."""
        checksum = self._file.checksum
        if checksum is None or self._hash.hexdigest() == checksum.value.lower():
            return
        found = self._hash.hexdigest()
        self._restart(out)
        raise TransferError(
            "corrupt_download",
            f"{self._file.path}: its {checksum.algorithm} is {found}, and it should be {checksum.value}; nothing of it "
            "was kept",
        )


def _left(response: urllib3.BaseHTTPResponse) -> int:
    """Bytes that were announced and did not come."""
    return getattr(response, "length_remaining", 0) or 0


def _first(response: urllib3.BaseHTTPResponse) -> int | None:
    """Where the bytes of a 206 begin."""
    unit, _, rest = response.headers.get("content-range", "").partition(" ")
    first = rest.partition("-")[0]
    return int(first) if unit == "bytes" and first.isdigit() else None


def write_at(out: BinaryIO, data: bytes, offset: int) -> None:
    """All of `data`, at `offset`."""
    view = memoryview(data)
    while view:
        count = os.pwrite(out.fileno(), view, offset)
        offset += count
        view = view[count:]


@contextlib.contextmanager
def disk_errors(where: Path) -> Iterator[None]:
    """Says in a `TransferError` what is wrong with the disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise TransferError(
                "disk_full",
                f"{where}: no room is left ({os.strerror(error.errno or 0)}); give the model cache more, or remove "
                "models with `wherry cache rm`. What is here is kept, and the download goes on from there",
            ) from None
        raise TransferError("cache_unusable", f"{where}: {os.strerror(error.errno or 0)}") from None


def need_room(directory: Path, count: int) -> None:
    """Raises TransferError where `count` more bytes have no room in `directory`."""
    with disk_errors(directory):
        stats = os.statvfs(directory)
    free = stats.f_bavail * stats.f_frsize
    if count > free:
        raise TransferError(
            "disk_full",
            f"{directory}: the download needs {size_text(count)} more and {size_text(free)} are free; give the model "
            "cache more, or remove models with `wherry cache rm`",
        )
