"""From a model URI to a directory on this machine."""

import os
from pathlib import Path
from urllib.parse import unquote, urlsplit

from wherry_protocol.naming import ENV_SAMPLE_MODELS
from wherry_runtime.formats.detect import kind_of
from wherry_runtime.loading.errors import ModelError


def locate(uri: str) -> Path:
    """The directory that `uri` (file:///dir, sample://name or a plain path) names.

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
    else:
        known = "file:///dir, sample://name or a plain path"
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
