"""`https://HOST/FILE.gguf#sha256=HEX`, or a directory by its list of checksums: `https://HOST/DIR/SHA256SUMS#sha256=HEX`.

The checksum is part of the URI, as a web server vouches for nothing. The list is what `sha256sum * > SHA256SUMS` makes,
and names what is beside it.
"""

import dataclasses
import hashlib
import re
from urllib.parse import quote, unquote, urldefrag, urljoin, urlsplit

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources import checksums
from wherry_runtime.sources.credentials import credential
from wherry_runtime.sources.http import Http, shown
from wherry_runtime.sources.select import select
from wherry_runtime.sources.types import Checksum, Listing, RemoteFile, Request, TransferError

_FRAGMENT = re.compile(r"sha256=([0-9a-fA-F]{64})")


class WebSource:
    """A `Source`."""

    def __init__(self, uri: str, http: Http) -> None:
        self._url, fragment = urldefrag(uri)
        parts = urlsplit(self._url)
        self._name = unquote(parts.path.rpartition("/")[2])
        found = _FRAGMENT.fullmatch(fragment)
        if not parts.hostname or found is None:
            raise ModelError(
                "unsupported_uri",
                f"{shown(uri)}: a web server's model needs its checksum: {shown(self._url)}#sha256=HEX, with what "
                "`sha256sum` says of the file",
            )
        if self._name != checksums.NAME and not self._name.endswith(".gguf"):
            raise ModelError(
                "unsupported_uri",
                f"{shown(uri)}: name a .gguf file, or a list {checksums.NAME} of all the model's files, which "
                f"`sha256sum * > {checksums.NAME}` makes",
            )
        self._sha256, self._http = found[1].lower(), http
        self.identity = shown(self._url)
        self.reference = f"sha256-{self._sha256}"
        self.pinned: str | None = self.reference

    def _request(self, url: str) -> Request:
        found = credential("HTTP_AUTHORIZATION")
        return Request(url, {"authorization": found} if found else {})

    def resolve(self) -> Listing:
        """See `Source`."""
        revision = f"sha256-{self._sha256}"
        if self._name != checksums.NAME:
            return Listing(revision, (self._file(self._name, self._url, self._sha256),), self._name, self._measured)
        data, _ = self._http.read(self._request(self._url), checksums.MAX_BYTES)
        if (found := hashlib.sha256(data).hexdigest()) != self._sha256:
            raise TransferError(
                "corrupt_download", f"{checksums.NAME}: its sha256 is {found}, and the URI says {self._sha256}"
            )
        sums = checksums.parse(data, checksums.NAME)
        paths, entry = select(sums.keys())
        files = (self._file(path, urljoin(self._url, f"./{quote(path)}"), sums[path]) for path in paths)
        return Listing(revision, tuple(files), entry, self._measured)

    def _measured(self, file: RemoteFile) -> RemoteFile:
        """The file with its size, if the server tells."""
        size, _ = self._http.measure(file.request())
        return dataclasses.replace(file, size=size)

    def _file(self, path: str, url: str, sha256: str) -> RemoteFile:
        return RemoteFile(path, None, Checksum("sha256", sha256), lambda: self._request(url))
