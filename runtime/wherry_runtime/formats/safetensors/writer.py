"""The header of a safetensors file; its data are the tensors one after the other."""

import json
from collections.abc import Sequence

from wherry_runtime.formats.safetensors.reader import LARGEST_HEADER, TensorInfo
from wherry_runtime.loading.errors import ModelError

_ALIGNMENT = 8


def encoded_header(metadata: dict[str, str], tensors: Sequence[TensorInfo]) -> bytes:
    """The header of a file whose tensors have the given offsets from the beginning of its data.

    Raises:
        ModelError: bad_metadata, if it is larger than the format allows.
    """
    header: dict[str, object] = {"__metadata__": metadata} if metadata else {}
    for info in tensors:
        offsets = [info.offset, info.offset + info.nbytes]
        header[info.name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    if len(text) > LARGEST_HEADER:
        raise ModelError("bad_metadata", f"a header of {len(text)} bytes is more than safetensors allows")
    return len(text).to_bytes(8, "little") + text
