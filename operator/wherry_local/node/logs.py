"""Reading container logs in the CRI format, as the kubelet serves them."""

import asyncio
import contextlib
import datetime
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path

_POLL_S = 0.1


@dataclass(frozen=True)
class LogOptions:
    """What `kubectl logs` asks for. `since` is a time; `tail` is -1 for all lines, `limit_bytes` 0 for no limit."""

    follow: bool = False
    tail: int = -1
    since: datetime.datetime | None = None
    timestamps: bool = False
    limit_bytes: int = 0


def parse_time(text: str) -> datetime.datetime:
    """An RFC 3339 time; fractions beyond microseconds are dropped."""
    head, dot, rest = text.partition(".")
    if dot:
        digits = rest.rstrip("Z")
        text = f"{head}.{digits[:6]}Z"
    return datetime.datetime.fromisoformat(text.replace("Z", "+00:00"))


def render(line: bytes, options: LogOptions) -> bytes:
    """The output for one log entry; empty when it is older than `since`."""
    stamp, _, rest = line.partition(b" ")
    _, _, rest = rest.partition(b" ")
    tag, _, text = rest.partition(b" ")
    if options.since is not None and parse_time(stamp.decode()) < options.since:
        return b""
    end = b"\n" if tag == b"F" else b""
    return (stamp + b" " if options.timestamps else b"") + text + end


def _backwards(path: Path, lines: int) -> int:
    """Offset at which the last `lines` entries of the file begin."""
    with path.open("rb") as file:
        position = file.seek(0, os.SEEK_END)
        needed = lines + 1  # the file ends with a newline that begins no entry
        while position > 0:
            step = min(65536, position)
            position -= step
            file.seek(position)
            block = file.read(step)
            found = block.count(b"\n")
            if found < needed:
                needed -= found
                continue
            for _ in range(needed):
                step = block.rindex(b"\n", 0, step)
            return position + step + 1
    return 0


def last_lines(path: Path, count: int) -> str:
    """The text of the last `count` lines of a log; empty when there is none."""
    if not path.exists() or count < 1:
        return ""
    with path.open("rb") as file:
        file.seek(_backwards(path, count))
        text = b"".join(render(line.rstrip(b"\n"), LogOptions()) for line in file)
    return text.decode(errors="replace")


async def read(
    path: Path, options: LogOptions, running: Callable[[], bool], *, plain: bool = False
) -> AsyncIterator[bytes]:
    """Pieces of the log; with `follow`, until `running` is false and everything was read.

    `plain` reads a file of plain lines, without the CRI format's heads.
    """
    left = options.limit_bytes or None
    async for piece in _pieces(path, options, running, _plain if plain else render):
        if left is not None:
            piece = piece[:left]
            left -= len(piece)
        if piece:
            yield piece
        if left == 0:
            return


def _plain(line: bytes, _: LogOptions) -> bytes:
    return line + b"\n"


class _Tail:
    """A log file read as it grows; when it was full and a new one was begun, it goes on with that."""

    def __init__(self, path: Path, tail: int) -> None:
        self.path = path
        self.file = path.open("rb")
        if tail >= 0:
            self.file.seek(_backwards(path, tail) if tail else self.file.seek(0, os.SEEK_END))
        self.rest = b""

    def lines(self) -> list[bytes]:
        """Whole lines written since the last call."""
        *lines, self.rest = (self.rest + self.file.read(1 << 20)).split(b"\n")
        return lines

    def renewed(self) -> bool:
        """True when a new file had been begun; it is open now."""
        if not self.path.exists() or self.path.stat().st_ino == os.fstat(self.file.fileno()).st_ino:
            return False
        self.file.close()
        self.file = self.path.open("rb")
        return True


def _older(path: Path, options: LogOptions) -> bytes:
    older = path.with_name(path.name + ".1")
    return older.read_bytes() if options.tail < 0 and older.exists() else b""


async def _pieces(
    path: Path, options: LogOptions, running: Callable[[], bool], line_of: Callable[[bytes, LogOptions], bytes]
) -> AsyncIterator[bytes]:
    exists = path.exists  # a look at a local file: too quick to be worth a thread
    while not exists():
        if not options.follow or not running():
            return
        await asyncio.sleep(_POLL_S)
    yield b"".join(line_of(line, options) for line in _older(path, options).splitlines())
    tail = _Tail(path, options.tail)
    with contextlib.closing(tail.file):
        while True:
            alive = running()  # before reading, so that what a process wrote at its end is still seen
            if lines := tail.lines():
                yield b"".join(line_of(line, options) for line in lines)
            elif not tail.renewed():
                if not options.follow or not alive:
                    return
                await asyncio.sleep(_POLL_S)
