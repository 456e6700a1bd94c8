"""Processes told apart by more than their number.

A process id is reused by the kernel, so nothing here signals a bare one. A process is known by its id together with
its start time and the boot it was started in; or by a marker in its environment, which children inherit and which no
process can have unless local mode started it. Signals go through a pidfd opened before the check, so that a process
that ends between check and signal is never mistaken for its successor. Linux only.
"""

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_POLL_S = 0.05


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()[:8]


def _stat(pid: int) -> list[str] | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return text[text.rindex(")") + 2 :].split()  # the name before it may hold spaces and brackets


@dataclass(frozen=True)
class Identity:
    """A process that stays itself: `started` is the boot and the kernel's start tick."""

    pid: int
    started: str

    @classmethod
    def of(cls, pid: int) -> "Identity | None":
        """The identity of the live process `pid`, or None if there is none."""
        stat = _stat(pid)
        return None if stat is None or stat[0] == "Z" else cls(pid, f"{_boot()}/{stat[19]}")

    @classmethod
    def from_json(cls, value: Any) -> "Identity | None":
        """What `to_json` wrote."""
        return cls(int(value["pid"]), str(value["started"])) if value and value.get("pid") else None

    def to_json(self) -> dict[str, Any]:
        """For a state file."""
        return {"pid": self.pid, "started": self.started}

    def alive(self) -> bool:
        """True while this very process runs (a zombie does not)."""
        return Identity.of(self.pid) == self

    def send(self, number: signal.Signals) -> bool:
        """Signal this process; False when it is gone."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return False
        try:
            if not self.alive():
                return False
            signal.pidfd_send_signal(descriptor, number)
        except ProcessLookupError:
            return False
        finally:
            os.close(descriptor)
        return True

    async def wait(self) -> None:
        """Return when this process has ended, whoever its parent is."""
        try:
            descriptor = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        try:
            if not self.alive():
                return
            loop.add_reader(descriptor, ended.set)
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
            os.close(descriptor)


def marked(name: str, value: str) -> list[int]:
    """Ids of live processes with `name=value` in the environment they were started with."""
    needle = f"{name}={value}".encode()
    found = []
    for entry in os.scandir("/proc"):
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if needle in Path(f"/proc/{entry.name}/environ").read_bytes().split(b"\0"):
                    found.append(int(entry.name))
    return found


def signal_marked(name: str, value: str, number: signal.Signals) -> int:
    """Signal every process with the marker, but never the caller; returns how many were signalled."""
    count = 0
    for pid in marked(name, value):
        if pid == os.getpid():
            continue
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            continue
        try:
            if f"{name}={value}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                signal.pidfd_send_signal(descriptor, number)
                count += 1
        except OSError:
            pass
        finally:
            os.close(descriptor)
    return count


def kill_marked(name: str, value: str, timeout_s: float = 10) -> None:
    """SIGKILL every process with the marker until none is left.

    Raises TimeoutError if some survive, which only a process stuck in the kernel does.
    """
    deadline = time.monotonic() + timeout_s
    while signal_marked(name, value, signal.SIGKILL):
        if time.monotonic() > deadline:
            raise TimeoutError(f"processes with {name}={value} do not end: {marked(name, value)}")
        time.sleep(_POLL_S)


def wait_gone(identities: Iterable[Identity], timeout_s: float) -> list[Identity]:
    """Wait until all have ended; returns those that have not within `timeout_s`."""
    deadline = time.monotonic() + timeout_s
    left = [identity for identity in identities if identity.alive()]
    while left and time.monotonic() < deadline:
        time.sleep(_POLL_S)
        left = [identity for identity in left if identity.alive()]
    return left
