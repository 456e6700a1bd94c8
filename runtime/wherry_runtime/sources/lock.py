"""One process at a time downloads a model; the others wait and see how far it is.

Two things together, because caches are shared by processes of one node (a hostPath) and of several (a volume that many
mount):

- `flock` on a file. The kernel lets go of it when its holder dies, by whatever signal, so a dead one is taken over
  from at once. It holds between nodes on NFS (where Linux makes it a lock of the server's), CephFS, Lustre and GPFS.
- A lease, for volumes on which `flock` holds on one node only or not at all (NFS with `local_lock` or `nolock`, SMB
  with `nobrl`, most FUSE file systems): a file that says who downloads and how far it is, written anew every second.
  Who gets the flock while another node's lease is there watches it: as long as it changes that node is alive, and is
  waited for. No clock of another machine is compared with this one's.

Nothing is wrong where both fail: files are checked and renamed as a whole, so all that is lost is a second download.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import socket
import threading
import time
from pathlib import Path
from typing import Any

from wherry_runtime.sources.http import stopped
from wherry_runtime.sources.progress import Download
from wherry_runtime.sources.transfer import disk_errors

log = logging.getLogger("wherry.sources")

BEAT_S = 1.0
LOOK_S = 0.2
# A lease that has not changed for so long is that of a dead node.
LEASE_S = 30.0
_NO_LOCKS = frozenset({errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL})


def node() -> str:
    """Names this machine as it runs now; containers of one node have the same."""
    with contextlib.suppress(OSError):
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return socket.gethostname()


class Lock:
    """The right to download into `directory`. Enter with `acquire`, leave with `release`."""

    def __init__(self, directory: Path) -> None:
        self._path, self._lease = directory / "lock", directory / "lease.json"
        self._descriptor: int | None = None
        self._beats = 0
        self._beaten = float("-inf")
        self._me = f"{socket.gethostname()}:{os.getpid()}"

    def acquire(self, progress: Download, stop: threading.Event) -> None:
        """Waits for it, telling `progress` how far its holder is.

        Raises:
            TransferError: the lock file cannot be made, or `stop` was set.
        """
        with disk_errors(self._path):
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        watch = _Watch()
        try:
            while not (_flock(descriptor) and watch.free(self._read())):
                _unlock(descriptor)
                self._tell(progress)
                _pause(stop)
        except BaseException:
            os.close(descriptor)
            raise
        self._descriptor = descriptor

    def beat(self, progress: Download) -> None:
        """Says that the holder is alive and how far it is; once a second at most."""
        now = time.monotonic()
        if now - self._beaten < BEAT_S:
            return
        self._beats, self._beaten = self._beats + 1, now
        at = progress.snapshot()
        text = json.dumps(
            {"node": node(), "who": self._me, "beat": self._beats, "done": at.done, "total": at.total}, indent=1
        )
        new = self._lease.with_name(f"lease.{self._me}.tmp")
        # A lease that cannot be written costs at most a second download.
        with contextlib.suppress(OSError):
            new.write_text(text)
            new.rename(self._lease)

    def release(self) -> None:
        """Lets go."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            if self._read().get("who") == self._me:
                self._lease.unlink()
        _unlock(self._descriptor)
        os.close(self._descriptor)
        self._descriptor = None

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._lease.read_text())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    def _tell(self, progress: Download) -> None:
        lease = self._read()
        done, total = lease.get("done"), lease.get("total")
        if isinstance(done, int) and isinstance(total, int):
            progress.wait(str(lease.get("who", "another"))[:100], done, total)
        else:
            progress.wait("another", 0, 0)


class _Watch:
    """Whether the lease of another node is alive."""

    def __init__(self) -> None:
        self._seen: dict[str, Any] = {}
        self._since = time.monotonic()

    def free(self, lease: dict[str, Any]) -> bool:
        """Whether the one that `lease` tells of is gone."""
        # The flock of this node was free, so whoever of this node wrote it is dead.
        if not lease or lease.get("node") == node():
            return True
        now = time.monotonic()
        if lease != self._seen:
            self._seen, self._since = lease, now
        return now - self._since >= LEASE_S


def _pause(stop: threading.Event) -> None:
    """Raises TransferError where all is to end."""
    if stop.wait(LOOK_S):
        raise stopped()


def _flock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        log.warning("the model cache's volume has no locks (%s); only the lease guards it", os.strerror(error.errno))
    return True


def _unlock(descriptor: int) -> None:
    with contextlib.suppress(OSError):
        fcntl.flock(descriptor, fcntl.LOCK_UN)
