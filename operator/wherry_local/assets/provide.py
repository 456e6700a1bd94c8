"""One directory with all the binaries that are asked for: given, cached, downloaded or built."""

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from urllib.parse import urlsplit

from wherry_local.assets.catalog import Asset, catalog
from wherry_local.assets.download import DownloadError, download
from wherry_local.assets.gobuild import BuildError, build, have_go
from wherry_local.errors import LocalError
from wherry_local.files import locked, read_json, write_json
from wherry_local.paths import cache_root

ENV_ASSETS = "WHERRY_ASSETS"
Report = Callable[[str], None]
Progress = Callable[[str], contextlib.AbstractContextManager[Report]]


def provide(names: Sequence[str], progress: Progress) -> Path:
    """A directory that holds every binary in `names`.

    `$WHERRY_ASSETS` is taken as it is. Else `<cache root>/bin`, completed by downloads, or where a publisher cannot be
    reached by builds. Two runs at once do not collide. Raises LocalError saying what is missing and what to do.
    """
    known = catalog()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise LocalError(f"no such binary: {', '.join(unknown)}; there are {', '.join(sorted(known))}")
    if explicit := os.environ.get(ENV_ASSETS):
        return _explicit(Path(explicit).expanduser().absolute(), names)
    directory = cache_root() / "bin"
    if not _missing(directory, names, known):
        return directory
    directory.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with progress("waiting for the cache's lock"):
            stack.enter_context(locked(directory / ".lock"))
        _Fetcher(directory, progress).fetch([known[name] for name in _missing(directory, names, known)])
    return directory


def _explicit(directory: Path, names: Sequence[str]) -> Path:
    missing = [name for name in names if not os.access(directory / name, os.X_OK)]
    if missing:
        raise LocalError(
            f"${ENV_ASSETS} is {directory}, which lacks {', '.join(missing)}: put them there as executable files, "
            f"or unset ${ENV_ASSETS} to have them downloaded or built"
        )
    return directory


def _missing(directory: Path, names: Sequence[str], known: dict[str, Asset]) -> list[str]:
    """Names without a binary, or with one of another version."""
    versions = read_json(directory / "versions.json") or {}
    return [
        name
        for name in names
        if not os.access(directory / name, os.X_OK) or versions.get(name, known[name].version) != known[name].version
    ]


class _Fetcher:
    """Gets binaries one after another and remembers which hosts do not answer."""

    def __init__(self, directory: Path, progress: Progress) -> None:
        self.directory = directory
        self.progress = progress
        self.unreachable: dict[str, DownloadError] = {}

    def fetch(self, assets: Sequence[Asset]) -> None:
        """Get each asset. Raises LocalError at the first that cannot be had."""
        for asset in assets:
            error = self._download(asset)
            if error is not None:
                self._build(asset, error)
            versions = read_json(self.directory / "versions.json") or {}
            write_json(self.directory / "versions.json", versions | {asset.name: asset.version})

    def _download(self, asset: Asset) -> DownloadError | None:
        host = urlsplit(asset.url).netloc
        if host in self.unreachable:
            return self.unreachable[host]
        with self.progress(f"{asset.name} {asset.version}: download") as report:
            for attempt in (1, 2):
                try:
                    download(asset, self.directory, report)
                except DownloadError as error:
                    if error.unreachable:
                        self.unreachable[host] = error
                    if error.unreachable or attempt == 2:
                        report(f"failed: {error}")
                        return error
                else:
                    break
        return None

    def _build(self, asset: Asset, cause: DownloadError) -> None:
        if not have_go():
            raise LocalError(
                f"{asset.name} {asset.version} could not be downloaded ({cause}), and there is no Go to build it with. "
                f"Install Go, or set $WHERRY_ASSETS to a directory with the binaries, or $WHERRY_DOWNLOAD_MIRROR to "
                "a server that has them"
            )
        with self.progress(f"{asset.name} {asset.version}: build from {asset.module}"):
            try:
                build(asset, self.directory)
            except BuildError as error:
                raise LocalError(
                    f"{asset.name} {asset.version} could not be downloaded ({cause}) nor built: {error}"
                ) from error
