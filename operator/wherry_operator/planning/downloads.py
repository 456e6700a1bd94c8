"""How far workers are with downloading their model, from what they answer to probes. Pure."""

from collections.abc import Mapping
from dataclasses import replace

import msgspec

from wherry_operator.planning.types import Observed

# The status is written anew for each step, and a status is no progress bar.
STEP_PERCENT = 5


class _Download(msgspec.Struct):
    bytes: int = 0
    total: int = 0


class _Health(msgspec.Struct):
    download: _Download | None = None


_decode = msgspec.json.Decoder(_Health).decode


def progress_of(health: bytes) -> str:
    """What `GET /health` says of a download, like `40% of 15.2 GB`; empty where there is none."""
    try:
        download = _decode(health).download
    except msgspec.MsgspecError:
        return ""
    if download is None:
        return ""
    if download.total <= 0:
        return "its size is not known"
    percent = max(0, min(100, download.bytes * 100 // download.total))
    size = f"{download.total / 1e9:.1f} GB" if download.total >= 1e9 else f"{download.total / 1e6:.1f} MB"
    return f"{percent // STEP_PERCENT * STEP_PERCENT}% of {size}"


def with_downloads(observed: Observed, downloads: Mapping[str, str]) -> Observed:
    """The snapshot, with how far its pods are, by their uids."""
    pods = tuple(replace(pod, downloading=downloads.get(pod.uid, "")) for pod in observed.pods)
    return replace(observed, pods=pods)
