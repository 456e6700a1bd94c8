"""A model's URI → a verified directory or file on this machine. Blocking work: not for an event loop."""

import dataclasses
import logging
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources.http import Http, shown
from wherry_runtime.sources.lock import BEAT_S, Lock
from wherry_runtime.sources.progress import Download, size_text
from wherry_runtime.sources.registry import source_of
from wherry_runtime.sources.store import Cached, Store, check_names
from wherry_runtime.sources.transfer import PARTIAL, Transfer, disk_errors, need_room
from wherry_runtime.sources.types import Listing, Source, TransferError

log = logging.getLogger("wherry.sources")

AT_ONCE = 4  # files
LOG_S = 10.0

FIRST_TRIES = 4  # of a source that has not answered yet: a quarter of a minute


def fetch(uri: str, root: Path, progress: Download | None = None, stop: threading.Event | None = None) -> Path:
    """The model that `uri` names, downloaded to the cache at `root` unless it is there.

    Args:
        progress: follows the download; from any thread.
        stop: once set, ends the download soon. What came so far is kept.

    Raises:
        ModelError: why it cannot be had, and what to do.
    """
    progress = progress or Download()
    http = Http(stop)
    try:
        return _Fetch(source_of(uri, http), root, http, progress).run().path
    except TransferError as error:
        raise ModelError(error.code, f"{shown(uri)}: {error.message}") from None
    finally:
        progress.end()


class _Fetch:
    """One model on its way into the cache."""

    def __init__(self, source: Source, root: Path, http: Http, progress: Download) -> None:
        self._source, self._http, self._progress = source, http, progress
        self._store = Store(root, source)
        self._logged = time.monotonic()

    def run(self) -> Cached:
        if self._source.pinned and (found := self._store.whole(self._source.pinned)):
            self._store.remember(self._source.pinned)
            return found
        before = self._store.last()
        # Who has something to go on with does not wait long for a source that does not answer.
        self._http.tries = FIRST_TRIES if before is None else 2
        try:
            listing = self._source.resolve()
        except TransferError as error:
            if before is None or not (error.unreachable or error.code == "rate_limited"):
                raise
            log.warning("%s; going on with revision %s, which is in the cache", error.message, before.revision)
            return before
        check_names(listing)
        found = self._store.whole(listing.revision) or self._get(listing)
        self._store.remember(listing.revision)
        return found

    def _get(self, listing: Listing) -> Cached:
        self._store.make()
        lock = Lock(self._store.directory)
        self._acquire(lock)
        try:
            # Whoever had the lock may have made it whole.
            return self._store.whole(listing.revision) or self._download(listing, lock)
        finally:
            lock.release()

    def _acquire(self, lock: Lock) -> None:
        """Waits for the lock, and says in the log that it does."""
        done = threading.Event()

        def tell() -> None:
            while not done.wait(LOG_S):
                log.info("%s: waiting for the download, %s", self._source.identity, self._progress.snapshot())

        teller = threading.Thread(target=tell, name="wherry-waiting", daemon=True)
        teller.start()
        try:
            lock.acquire(self._progress, self._http.stop)
        finally:
            done.set()
            teller.join()

    def _download(self, listing: Listing, lock: Lock) -> Cached:
        listing = dataclasses.replace(listing, files=tuple(map(listing.prepare, listing.files)))
        staging = self._store.staging(listing.revision)
        total = sum(file.size or 0 for file in listing.files)
        here = _here(listing, staging)
        need_room(staging, total - here)
        self._progress.begin(total)
        lock.beat(self._progress)
        name = f"{self._source.identity} at {listing.revision}"
        log.info(
            "downloading %s: %d files, %s, %s of it here", name, len(listing.files), size_text(total), size_text(here)
        )
        began = time.monotonic()
        with disk_errors(staging):
            _forget_others(listing, staging)
        self._transfer(listing, staging, lock)
        if listing.finish is not None:
            listing = listing.finish(staging)
            with disk_errors(staging):
                _forget_others(listing, staging)
        found = self._store.publish(listing)
        log.info("downloaded %s: %s in %.1f s", name, size_text(found.size), time.monotonic() - began)
        return found

    def _transfer(self, listing: Listing, staging: Path, lock: Lock) -> None:
        """Downloads every file. The first that fails ends the others, which keep what they have."""
        pool = ThreadPoolExecutor(AT_ONCE, thread_name_prefix="wherry-download")
        # Small files first: what is wrong with a model shows in them.
        files = sorted(listing.files, key=lambda file: file.size or 0)
        work = [Transfer(file, staging / file.path, self._http, self._progress) for file in files]
        pending = {pool.submit(transfer.run) for transfer in work}
        try:
            while pending:
                done, pending = wait(pending, BEAT_S, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                lock.beat(self._progress)
                self._log()
        finally:
            if pending:
                self._http.stop.set()
            pool.shutdown(wait=True, cancel_futures=True)

    def _log(self) -> None:
        if (now := time.monotonic()) - self._logged >= LOG_S:
            self._logged = now
            log.info("downloading %s: %s", self._source.identity, self._progress.snapshot())


def _here(listing: Listing, staging: Path) -> int:
    """Bytes that need no room any more."""
    count = 0
    for file in listing.files:
        for path in (staging / file.path, staging / f"{file.path}{PARTIAL}"):
            if path.is_file():
                count += min(path.stat().st_size, file.size or 0)
                break
    return count


def _forget_others(listing: Listing, staging: Path) -> None:
    """Removes what is no file of this model: a snapshot holds nothing that was not checked."""
    kept = {staging / file.path for file in listing.files}
    kept |= {staging / f"{file.path}{PARTIAL}" for file in listing.files}
    for path in [found for found in staging.rglob("*") if not found.is_dir() and found not in kept]:
        path.unlink()
    for path in sorted((found for found in staging.rglob("*") if found.is_dir()), reverse=True):
        if not any(path.iterdir()):
            path.rmdir()
