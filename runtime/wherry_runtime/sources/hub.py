"""`hf://ORG/NAME[@REVISION][/PATH]`: a repository of the Hugging Face hub, or of a mirror that HF_ENDPOINT names.

The hub's library says what is there and how to ask for it. Bytes come the way that all sources' bytes come: its own
downloads check sizes only, and its cache locks with `flock` alone.
"""

import re
from urllib.parse import quote, unquote

from huggingface_hub import HfApi, get_token, hf_hub_url
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources.credentials import credential
from wherry_runtime.sources.http import Http, retry_after
from wherry_runtime.sources.select import select
from wherry_runtime.sources.types import Checksum, Listing, RemoteFile, Request, TransferError

DEFAULT_ENDPOINT = "https://huggingface.co"
TIMEOUT_S = 30.0
_URI = re.compile(r"hf://([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@([^/]+))?(?:/(.*))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class HubSource:
    """A `Source`."""

    def __init__(self, uri: str, http: Http) -> None:
        found = _URI.fullmatch(uri)
        if found is None:
            raise ModelError(
                "unsupported_uri", f"{uri}: a hub URI is hf://ORG/NAME, hf://ORG/NAME@REVISION or …/PATH/FILE.gguf"
            )
        self._repo, revision, inside = found[1], found[2], found[3] or ""
        self._revision = unquote(revision or "main")
        self._inside = inside.strip("/")
        self._http = http
        self._endpoint = (credential("HF_ENDPOINT") or DEFAULT_ENDPOINT).rstrip("/")
        self.identity = f"hf://{self._repo}"
        self.reference = f"{quote(self._revision, safe='')}/{self._inside}".rstrip("/")
        self.pinned = self._revision if _COMMIT.fullmatch(self._revision) else None

    def resolve(self) -> Listing:
        """See `Source`."""
        info = self._http.persist(self._ask)
        if not info.sha or not info.siblings:
            raise TransferError("model_not_found", f"{self._repo} has no files at {self._revision}")
        siblings = {sibling.rfilename: sibling for sibling in info.siblings}
        paths, entry = select(siblings.keys(), self._inside)
        return Listing(info.sha, tuple(self._file(siblings[path], info.sha) for path in paths), entry)

    def _token(self) -> str | None:
        return credential("HF_TOKEN") or get_token()

    def _ask(self) -> ModelInfo:
        api = HfApi(endpoint=self._endpoint, token=self._token() or False)
        try:
            return api.model_info(self._repo, revision=self._revision, files_metadata=True, timeout=TIMEOUT_S)
        except OfflineModeIsEnabled:
            raise TransferError("source_unreachable", "HF_HUB_OFFLINE is set", unreachable=True) from None
        except HfHubHTTPError as error:
            raise self._translated(error) from None
        except Exception as error:
            # Of the hub's HTTP library, which is not the same in all its versions.
            if not type(error).__module__.startswith(("httpx", "requests")):
                raise
            raise TransferError(
                "source_unreachable", f"{self._endpoint}: {type(error).__name__}", retry=True, unreachable=True
            ) from None

    def _translated(self, error: HfHubHTTPError) -> TransferError:
        status, headers = error.response.status_code, error.response.headers
        had = "the token" if self._token() else "a request without a token (HF_TOKEN)"
        if isinstance(error, GatedRepoError):
            return TransferError(
                "access_denied",
                f"{self._repo} is gated and {had} may not read it; accept its terms there with the token's account",
            )
        if isinstance(error, RevisionNotFoundError):
            return TransferError("model_not_found", f"{self._repo} has no revision {self._revision}")
        if isinstance(error, RepositoryNotFoundError) or status in (401, 403):
            return TransferError(
                "access_denied" if status in (401, 403) else "model_not_found",
                f"{self._repo} is not there, or it is private and {had} may not read it",
            )
        code = "rate_limited" if status == 429 else "source_unreachable"
        again = status in (408, 429) or status >= 500
        return TransferError(
            code,
            f"{self._endpoint}: {status}",
            retry=again,
            after_s=retry_after(headers),
            unreachable=status >= 500,
        )

    def _file(self, sibling: RepoSibling, commit: str) -> RemoteFile:
        path = sibling.rfilename
        url = hf_hub_url(self._repo, path, revision=commit, endpoint=self._endpoint)

        def request() -> Request:
            token = self._token()
            return Request(url, {"authorization": f"Bearer {token}"} if token else {})

        checksum = None
        if sibling.lfs is not None:
            checksum = Checksum("sha256", sibling.lfs.sha256)
        elif sibling.blob_id is not None and sibling.size is not None:
            checksum = Checksum("git-sha1", sibling.blob_id)
        return RemoteFile(path, sibling.size, checksum, request)
