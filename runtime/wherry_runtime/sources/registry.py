"""Which source a URI is of."""

from collections.abc import Callable
from urllib.parse import urlsplit

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources.http import Http, shown
from wherry_runtime.sources.types import Source

REMOTE = ("hf", "s3", "https", "http", "oci")


def is_remote(uri: str) -> bool:
    """Whether the model has to be downloaded."""
    return uri.partition("://")[0] in REMOTE and "://" in uri


def source_of(uri: str, http: Http) -> Source:
    """The source of `uri`.

    Raises:
        ModelError: unsupported_uri, with how it is written.
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc and parts.scheme != "hf" and not (parts.scheme == "oci" and "@sha256:" in uri):
        raise ModelError("unsupported_uri", f"{shown(uri)}: credentials do not belong into a URI; put them in a Secret")
    if not is_remote(uri):
        raise ModelError(
            "unsupported_uri", f"{shown(uri)}: it is downloaded from {', '.join(f'{s}://' for s in REMOTE)}"
        )
    return _maker(parts.scheme)(uri, http)


def _maker(scheme: str) -> Callable[[str, Http], Source]:
    # Imported late: nobody needs the libraries of sources that are not used.
    if scheme == "hf":
        from wherry_runtime.sources.hub import HubSource

        return HubSource
    if scheme == "s3":
        from wherry_runtime.sources.s3 import S3Source

        return S3Source
    if scheme == "oci":
        from wherry_runtime.sources.oci import OciSource

        return OciSource
    from wherry_runtime.sources.web import WebSource

    return WebSource
