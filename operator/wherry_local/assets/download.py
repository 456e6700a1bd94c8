"""Downloads that become a file only when their checksum is right."""

import hashlib
import os
import re
import shutil
import tarfile
import tempfile
import urllib.error
import urllib.request
from collections.abc import Callable
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.parse import urlsplit

from wherry_local.assets.catalog import Asset

ENV_MIRROR = "WHERRY_DOWNLOAD_MIRROR"
_CONNECT_S = 5.0  # long enough for a slow network, short enough that a machine without one is soon known
_READ_S = 60.0
_CHUNK = 1 << 20
_MAX_CHECKSUMS = 1 << 20

Report = Callable[[str], None]


class DownloadError(Exception):
    """The download did not give what it should. `unreachable` is true when the host did not answer at all."""

    def __init__(self, message: str, *, unreachable: bool = False) -> None:
        super().__init__(message)
        self.unreachable = unreachable


def mirrored(url: str) -> str:
    """`url`, or its copy under `$WHERRY_DOWNLOAD_MIRROR`: `<mirror>/<host>/<path>`."""
    mirror = os.environ.get(ENV_MIRROR, "")
    parts = urlsplit(url)
    return f"{mirror.rstrip('/')}/{parts.netloc}{parts.path}" if mirror else url


def _open(url: str, timeout_s: float) -> HTTPResponse:
    request = urllib.request.Request(mirrored(url), headers={"User-Agent": "wherry"})  # noqa: S310 - from the catalog
    try:
        answer: HTTPResponse = urllib.request.urlopen(request, timeout=timeout_s)  # noqa: S310
    except urllib.error.HTTPError as error:
        with error:
            raise DownloadError(f"{mirrored(url)}: HTTP status {error.code}") from error
    except (OSError, HTTPException) as error:
        cause = getattr(error, "reason", error)
        raise DownloadError(f"{mirrored(url)}: {cause}", unreachable=True) from error
    return answer


def expected_sum(text: str, file_name: str) -> str:
    """The sha256 of `file_name` in a checksum file. Raises DownloadError when it has none."""
    for line in text.splitlines():
        words = line.split()
        if words and re.fullmatch(r"[0-9a-fA-F]{64}", words[0]):
            named = words[1].lstrip("*").rpartition("/")[2] if len(words) > 1 else file_name
            if named == file_name:
                return words[0].lower()
    raise DownloadError(f"the checksum file names no sha256 for {file_name}")


def _fetch(url: str, target: Path, wanted: str, report: Report) -> None:
    digest, size = hashlib.sha256(), 0
    with _open(url, _READ_S) as answer, target.open("wb") as file:
        total = int(answer.headers.get("Content-Length") or 0)
        try:
            while chunk := answer.read(_CHUNK):
                digest.update(chunk)
                file.write(chunk)
                size += len(chunk)
                report(f"{size >> 20} of {total >> 20} MiB" if total else f"{size >> 20} MiB")
        except (OSError, HTTPException) as error:
            raise DownloadError(f"{mirrored(url)}: cut off after {size} bytes: {error}") from error
    if total and size != total:
        raise DownloadError(f"{mirrored(url)}: cut off after {size} of {total} bytes")
    if digest.hexdigest() != wanted:
        raise DownloadError(f"{mirrored(url)}: sha256 is {digest.hexdigest()}, not {wanted} as its publisher says")


def _extract(archive: Path, member: str, target: Path) -> None:
    try:
        with tarfile.open(archive) as tar:
            source = tar.extractfile(member)
            if source is None:
                raise DownloadError(f"{member} in the archive is no file")
            with source, target.open("wb") as file:
                shutil.copyfileobj(source, file)
    except (KeyError, tarfile.TarError) as error:
        raise DownloadError(f"the archive has no {member}: {error}") from error


def download(asset: Asset, directory: Path, report: Report) -> Path:
    """Put the verified binary at `directory/<name>` and return its path. Raises DownloadError, leaving nothing."""
    with _open(asset.checksums, _CONNECT_S) as answer:
        sums = answer.read(_MAX_CHECKSUMS).decode(errors="replace")
    wanted = expected_sum(sums, asset.url.rpartition("/")[2])
    with tempfile.TemporaryDirectory(dir=directory, prefix=".download-") as scratch:
        got, binary = Path(scratch) / "download", Path(scratch) / "binary"
        _fetch(asset.url, got, wanted, report)
        if asset.member:
            _extract(got, asset.member, binary)
        else:
            binary = got
        binary.chmod(0o755)
        return binary.replace(directory / asset.name)
