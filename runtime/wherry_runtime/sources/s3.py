"""`s3://BUCKET/PREFIX`: objects of S3, or of what speaks its API (AWS_ENDPOINT_URL).

obstore lists and signs: it knows keys in the environment, web identity (IRSA), EKS pod identity and instance profiles.
The signed URLs are then fetched the way that all sources' are.

What S3 tells of an object's content is an MD5 at most, and only of those that were put in one piece and are not
encrypted with a key of KMS. A `SHA256SUMS` beside the files is therefore used where there is one.
"""

import dataclasses
import hashlib
import re
from collections.abc import Mapping
from datetime import timedelta
from typing import Any
from urllib.parse import quote

import obstore
from obstore.exceptions import BaseError
from obstore.store import S3Store

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources import checksums
from wherry_runtime.sources.credentials import credential
from wherry_runtime.sources.http import Http
from wherry_runtime.sources.select import select
from wherry_runtime.sources.types import Checksum, Listing, RemoteFile, Request, TransferError

MAX_OBJECTS = 100_000
SIGNED_FOR = timedelta(hours=12)
_URI = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(.*))?")
_MD5 = re.compile(r"[0-9a-f]{32}")
_STATUS = re.compile(r"status code: (\d{3})")
_SETTINGS = {
    "access_key_id": "AWS_ACCESS_KEY_ID",
    "secret_access_key": "AWS_SECRET_ACCESS_KEY",
    "session_token": "AWS_SESSION_TOKEN",
}


class S3Source:
    """A `Source`."""

    def __init__(self, uri: str, http: Http) -> None:
        found = _URI.fullmatch(uri)
        if found is None:
            raise ModelError("unsupported_uri", f"{uri}: an S3 URI is s3://BUCKET/PREFIX or s3://BUCKET/PATH/FILE.gguf")
        self._bucket, path = found[1], (found[2] or "").strip("/")
        # A GGUF is chosen among what is beside it: it may be one of several shards.
        directory, _, name = path.rpartition("/")
        self._prefix, self._inside = (directory, name) if name.endswith(".gguf") else (path, "")
        self._http = http
        self._region = credential("AWS_REGION") or credential("AWS_DEFAULT_REGION") or "us-east-1"
        endpoint = credential("AWS_ENDPOINT_URL_S3") or credential("AWS_ENDPOINT_URL")
        self._endpoint = (endpoint or f"https://s3.{self._region}.amazonaws.com").rstrip("/")
        self._unsigned = (credential("AWS_SKIP_SIGNATURE") or "").lower() == "true"
        self.identity = f"s3://{self._bucket}/{self._prefix}".rstrip("/")
        self.reference = f"latest/{self._inside}".rstrip("/")
        self.pinned: str | None = None

    def _store(self) -> S3Store:
        # Made anew each time: credentials may have been renewed.
        settings: dict[str, Any] = {ours: found for ours, name in _SETTINGS.items() if (found := credential(name))}
        return S3Store(
            self._bucket,
            region=self._region,
            endpoint=self._endpoint,
            skip_signature=self._unsigned,
            client_options={"allow_http": True, "connect_timeout": "10s", "timeout": "60s"},
            retry_config={"max_retries": 2, "retry_timeout": timedelta(seconds=20)},
            **settings,
        )

    def resolve(self) -> Listing:
        """See `Source`."""
        found = self._http.persist(self._list)
        if not found:
            raise TransferError("model_not_found", f"{self.identity} holds no objects")
        sums = self._sums() if checksums.NAME in found else {}
        paths, entry = select(found.keys() - {checksums.NAME}, self._inside)
        if sums and (missing := [path for path in paths if path not in sums]):
            raise TransferError("bad_checksums", f"{checksums.NAME} does not name {missing[0]}")
        files = tuple(self._file(path, found[path], sums.get(path)) for path in paths)
        text = "\n".join(f"{path} {found[path]['size']} {found[path].get('e_tag')}" for path in paths)
        return Listing(hashlib.sha256(text.encode()).hexdigest(), files, entry, self._without_false_md5)

    def _list(self) -> dict[str, Mapping[str, Any]]:
        """What is known of each object, by its name under the prefix."""
        found: dict[str, Mapping[str, Any]] = {}
        cut = len(self._prefix) + 1 if self._prefix else 0
        try:
            for batch in obstore.list(self._store(), prefix=self._prefix or None, chunk_size=1000):
                found |= {entry["path"][cut:]: entry for entry in batch}
                if len(found) > MAX_OBJECTS:
                    raise TransferError("too_large", f"{self.identity} holds over {MAX_OBJECTS} objects; name a prefix")
        except BaseError as error:
            raise self._translated(str(error)) from None
        return found

    def _translated(self, text: str) -> TransferError:
        """What went wrong, of a text that holds URLs, signatures maybe, and a status in words."""
        found = _STATUS.search(text)
        status = int(found[1]) if found else 0
        if status in (401, 403):
            return TransferError(
                "access_denied",
                f"{self.identity}: {status}; the credentials do not allow it, see the model's secretName",
            )
        if status == 404:
            return TransferError("model_not_found", f"{self.identity}: there is no such bucket at {self._endpoint}")
        what = status or "no answer, or no credentials"
        return TransferError(
            "source_unreachable",
            f"{self.identity} at {self._endpoint}: {what}; AWS_REGION is {self._region}",
            retry=status not in (301, 307, 400),
            unreachable=status == 0 or status >= 500,
        )

    def _key(self, path: str) -> str:
        return f"{self._prefix}/{path}" if self._prefix else path

    def _url(self, path: str) -> str:
        if self._unsigned:
            return f"{self._endpoint}/{self._bucket}/{quote(self._key(path))}"
        try:
            return str(obstore.sign(self._store(), "GET", self._key(path), SIGNED_FOR))
        except BaseError as error:
            raise TransferError(
                "access_denied", f"{self.identity}: a request cannot be signed ({type(error).__name__})", retry=True
            ) from None

    def _sums(self) -> dict[str, str]:
        data, _ = self._http.read(Request(self._url(checksums.NAME)), checksums.MAX_BYTES)
        return checksums.parse(data, checksums.NAME)

    def _file(self, path: str, entry: Mapping[str, Any], sha256: str | None) -> RemoteFile:
        etag = str(entry.get("e_tag") or "")

        def request() -> Request:
            return Request(self._url(path), {"if-match": etag} if etag else {})

        etag_md5 = Checksum("md5", etag.strip('"')) if _MD5.fullmatch(etag.strip('"')) else None
        return RemoteFile(path, int(entry["size"]), Checksum("sha256", sha256) if sha256 else etag_md5, request)

    def _without_false_md5(self, file: RemoteFile) -> RemoteFile:
        """The file without its MD5, where its ETag only looks like one: encrypted with a key of KMS or of its owner."""
        if file.checksum is None or file.checksum.algorithm != "md5":
            return file
        _, headers = self._http.measure(file.request())
        by_kms = headers.get("x-amz-server-side-encryption", "").startswith("aws:kms")
        encrypted = by_kms or "x-amz-server-side-encryption-customer-algorithm" in headers
        return dataclasses.replace(file, checksum=None) if encrypted else file
