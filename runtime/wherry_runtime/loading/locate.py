"""From a model URI to a directory, or a GGUF file, on this machine."""

import os
import threading
from pathlib import Path
from urllib.parse import unquote, urlsplit

import msgspec

from wherry_protocol.engine_config import EngineConfig
from wherry_protocol.naming import ENV_SAMPLE_MODELS
from wherry_runtime.formats.detect import kind_of
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources.progress import Download
from wherry_runtime.sources.registry import is_remote
from wherry_runtime.sources.store import cache_root


def local_uri(uri: str, cache: Path, progress: Download | None = None, stop: threading.Event | None = None) -> str:
    """`uri` with what has to be downloaded here, in `cache`: then a URI of that. Blocks as long as it takes.

    Raises:
        ModelError: why it cannot be had.
    """
    if not is_remote(uri):
        return uri
    # Imported late: most models are here already.
    from wherry_runtime.sources.fetch import fetch

    return fetch(uri, cache, progress, stop).absolute().as_uri()


def with_local_models(config: EngineConfig, progress: Download | None = None) -> EngineConfig:
    """`config` with models that are here: those that are elsewhere are downloaded, which blocks as long as it takes.

    Raises:
        ModelError: why one cannot be had.
    """
    cache = cache_root(config.model_cache)
    model, draft = (local_uri(uri, cache, progress) for uri in (config.model_uri, config.draft_model_uri))
    return msgspec.structs.replace(config, model_uri=model, draft_model_uri=draft)


def locate(uri: str) -> Path:
    """The directory, or the .gguf file, that `uri` (file:///dir, sample://name or a plain path) names.

    Raises:
        ModelError: unsupported_uri, or model_not_found with the path that was looked at.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        path = Path(uri).expanduser()
    elif scheme == "file":
        parts = urlsplit(uri)
        if parts.netloc not in ("", "localhost"):
            raise ModelError("unsupported_uri", f"{uri}: write file:///absolute/path, with three slashes")
        path = Path(unquote(parts.path))
    elif scheme == "sample":
        path = _sample_root() / _sample_name(rest, uri)
    elif is_remote(uri):
        raise ModelError("unsupported_uri", f"{uri}: it has to be downloaded first, by `wherry pull {uri}`")
    else:
        known = "file:///dir, sample://name, a plain path, or hf://, s3://, https:// and oci://"
        raise ModelError("unsupported_uri", f"{uri}: {scheme}:// is not supported by the runtime; use {known}")
    if not path.exists():
        raise ModelError("model_not_found", f"{path}: no such directory (model URI {uri})")
    if not path.is_dir() and kind_of(path) != "gguf":
        raise ModelError(
            "model_not_found", f"{path}: is a file, a model is a directory or a GGUF file (model URI {uri})"
        )
    return path


def _sample_name(name: str, uri: str) -> str:
    if not name or name in (".", "..") or "/" in name or "\\" in name:
        raise ModelError("unsupported_uri", f"{uri}: a sample model is named like sample://tiny")
    return name


def _sample_root() -> Path:
    """Where sample models are: the environment says, else `examples/models` of the checkout this file is in."""
    if configured := os.environ.get(ENV_SAMPLE_MODELS):
        return Path(configured)
    checkout = Path(__file__).resolve().parents[3] / "examples" / "models"
    if checkout.is_dir():
        return checkout
    raise ModelError("model_not_found", f"sample models: set {ENV_SAMPLE_MODELS} to the directory that holds them")
