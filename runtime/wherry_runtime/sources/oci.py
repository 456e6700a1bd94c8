"""`oci://REGISTRY/REPOSITORY[:TAG|@sha256:HEX]`: an artifact whose layers are a model's files.

Spoken over the distribution spec (https://github.com/opencontainers/distribution-spec/blob/main/spec.md). A layer is a
file, named by the annotation of ModelPack (https://github.com/modelpack/model-spec) or of ORAS, or an archive of files;
of the layers of a container image what is under /models.
"""

import base64
import hashlib
import json
import os
import platform
import re
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources.credentials import credential
from wherry_runtime.sources.http import Http
from wherry_runtime.sources.select import select
from wherry_runtime.sources.types import Checksum, Listing, RemoteFile, Request, TransferError
from wherry_runtime.sources.unpack import unpack

MAX_MANIFEST = 4 << 20
MAX_TOKEN = 1 << 20
NAMES = ("org.cncf.model.filepath", "org.opencontainers.image.title")
LAYERS = ".layers"  # where archives are until they are unpacked
IN_IMAGE = "models"
# Kinds of ModelPack's layers that no runtime needs.
BESIDE = (".model.doc.", ".model.code.", ".model.dataset.")
ACCEPT = ", ".join(
    (
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.oci.image.index.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
        "application/vnd.docker.distribution.manifest.list.v2+json",
    )
)
_URI = re.compile(
    r"oci://([A-Za-z0-9.-]+(?::\d+)?|\[[0-9a-fA-F:]+\](?::\d+)?)/([a-z0-9]+(?:[._/-]+[a-z0-9]+)*)"
    r"(?::([\w][\w.-]{0,127})|@(sha256:[0-9a-f]{64}))?"
)
_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
_SHA256 = re.compile(r"sha256:[0-9a-f]{64}")


class OciSource:
    """A `Source`."""

    def __init__(self, uri: str, http: Http) -> None:
        found = _URI.fullmatch(uri)
        if found is None:
            raise ModelError(
                "unsupported_uri",
                f"{uri}: an OCI URI is oci://REGISTRY/REPOSITORY:TAG or …@sha256:HEX, in small letters",
            )
        self._registry, self._repository = found[1], found[2]
        self._wanted = found[4] or found[3] or "latest"
        self._http, self._token = http, ""
        host = urlsplit(f"//{self._registry}").hostname or ""
        # As container engines do: a registry of this machine has no certificate.
        plain = host in ("localhost", "127.0.0.1", "::1") or self._registry in (
            credential("OCI_PLAIN_HTTP") or ""
        ).split(",")
        self._base = f"{'http' if plain else 'https'}://{self._registry}"
        self.identity = f"oci://{self._registry}/{self._repository}"
        self.reference = self._wanted
        self.pinned = found[4]

    def resolve(self) -> Listing:
        """See `Source`."""
        digest, manifest = self._manifest(self._wanted)
        if "manifests" in manifest:
            _, manifest = self._manifest(self._of_platform(manifest["manifests"]))
        plain: dict[str, RemoteFile] = {}
        archives: dict[str, str] = {}
        files = []
        for number, layer in enumerate(manifest.get("layers") or []):
            kind = str(layer.get("mediaType"))
            if any(word in kind for word in BESIDE):
                continue
            archive = bool({"tar", "tgz"} & set(re.split(r"[.+]", kind)))
            name = f"{LAYERS}/{number:04}.tar" if archive else _name(layer)
            if not name:
                continue
            file = self._file(name, layer)
            files.append(file)
            if archive:
                archives[name] = IN_IMAGE if ".image." in kind else ""
            else:
                plain[name] = file
        if not files:
            raise TransferError(
                "unsupported_format",
                "no layer has a file's name: push the model's files with `oras push`, as a ModelPack, or in an image "
                "with a /models directory",
            )
        if not archives:
            paths, entry = select(plain.keys())
            return Listing(digest, tuple(plain[path] for path in paths), entry)

        def finish(directory: Path) -> Listing:
            names = unpack(archives, directory, self._http.stop)
            paths, entry = select({*names, *plain})
            # What was in an archive has been checked with it.
            found = tuple(plain.get(path) or RemoteFile(path, None, None, lambda: Request("")) for path in paths)
            return Listing(digest, found, entry)

        return Listing(digest, tuple(files), finish=finish)

    def _manifest(self, reference: str) -> tuple[str, dict[str, Any]]:
        """A manifest and its digest.

        Raises:
            TransferError: it cannot be had, or is not what its digest says.
        """
        url = f"{self._base}/v2/{self._repository}/manifests/{reference}"
        data = self._authorized(url, MAX_MANIFEST)
        digest = f"sha256:{hashlib.sha256(data).hexdigest()}"
        if _SHA256.fullmatch(reference) and digest != reference:
            raise TransferError("corrupt_download", f"the manifest {reference} has the digest {digest}")
        try:
            manifest = json.loads(data)
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict):
            raise TransferError("unsupported_format", f"{reference}: what the registry has is no manifest")
        return digest, manifest

    def _of_platform(self, manifests: list[dict[str, Any]]) -> str:
        machine = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
        of_ours = [m for m in manifests if (m.get("platform") or {}).get("architecture") == machine]
        chosen = (of_ours or manifests or [{}])[0].get("digest")
        if not isinstance(chosen, str) or not _SHA256.fullmatch(chosen):
            raise TransferError("unsupported_format", "the index names no manifest by a sha256 digest")
        return chosen

    def _authorized(self, url: str, limit: int) -> bytes:
        """A body, with a token where the registry asks for one."""
        headers = {"accept": ACCEPT}
        data, response = self._http.read(Request(url, headers | self._authorization()), limit, take=(200, 401))
        if response.status == 401:
            self._log_in(response.headers.get("www-authenticate", ""))
            data, _ = self._http.read(Request(url, headers | self._authorization()), limit)
        return data

    def _authorization(self) -> dict[str, str]:
        return {"authorization": self._token} if self._token else {}

    def _log_in(self, challenge: str) -> None:
        """Answers the registry: https://distribution.github.io/distribution/spec/auth/token/."""
        kind, _, rest = challenge.partition(" ")
        basic = docker_login(self._registry)
        if kind.lower() == "basic" and basic:
            self._token = f"Basic {basic}"
            return
        parameters = dict(_PARAMETER.findall(rest))
        realm = parameters.get("realm", "")
        if kind.lower() != "bearer" or not realm:
            raise TransferError("access_denied", f"{self._registry}: it asks for a login; see the model's secretName")
        if self._base.startswith("https:") and not realm.startswith("https:"):
            raise TransferError("access_denied", f"{self._registry}: it asks to log in without TLS")
        query = {"scope": f"repository:{self._repository}:pull"}
        if service := parameters.get("service"):
            query["service"] = service
        url = f"{realm}{'&' if '?' in realm else '?'}{urlencode(query)}"
        data, _ = self._http.read(Request(url, {"authorization": f"Basic {basic}"} if basic else {}), MAX_TOKEN)
        try:
            found = json.loads(data)
            token = found.get("token") or found["access_token"]
        except (ValueError, KeyError, AttributeError):
            raise TransferError("access_denied", f"{self._registry}: its login answers no token") from None
        self._token = f"Bearer {token}"

    def _file(self, path: str, layer: dict[str, Any]) -> RemoteFile:
        digest, size = str(layer.get("digest")), layer.get("size")
        if not _SHA256.fullmatch(digest) or not isinstance(size, int):
            raise TransferError("unsupported_format", f"{path}: the layer has no sha256 digest and size")
        if "zstd" in str(layer.get("mediaType")):
            raise TransferError("unsupported_format", f"{path}: layers of zstd are not read; use gzip or none")
        url = f"{self._base}/v2/{self._repository}/blobs/{digest}"
        checksum = Checksum("sha256", digest.removeprefix("sha256:"))
        return RemoteFile(path, size, checksum, lambda: Request(url, self._authorization()))


def _name(layer: dict[str, Any]) -> str:
    annotations = layer.get("annotations") or {}
    return next((str(annotations[key]) for key in NAMES if annotations.get(key)), "")


def docker_login(registry: str) -> str | None:
    """User and password for `registry`, in base64: of the Secret's `.dockerconfigjson`, else of the file that container
    engines use."""
    text = credential(".dockerconfigjson")
    if text is None:
        path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
        text = path.read_text() if path.is_file() else "{}"
    try:
        found = (json.loads(text).get("auths") or {}).get(registry) or {}
        if found.get("auth"):
            return str(found["auth"])
        if found.get("username"):
            return base64.b64encode(f"{found['username']}:{found['password']}".encode()).decode()
    except (ValueError, KeyError, AttributeError):
        raise TransferError("access_denied", "the Docker configuration with the login cannot be read") from None
    return None
