"""The files of a checkpoint in safetensors."""

import re
from pathlib import Path

from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# Buffers that old checkpoints carry and nobody reads.
IGNORED = re.compile(r"\.rotary_emb\.(inv_freq|cos_cached|sin_cached)$|\.masked_bias$|\.attn\.bias$")


def safetensors_files(directory: Path) -> list[Path]:
    """The files, in order; none if there are neither weights nor an index.

    Raises:
        ModelError: missing_shard, or what is wrong with the index.
    """
    if (directory / SINGLE).is_file():
        return [directory / SINGLE]
    return indexed_files(directory, INDEX) if (directory / INDEX).is_file() else []


def indexed_files(directory: Path, index: str) -> list[Path]:
    """The files that an index (`weight_map`: tensor name to file name) names, in order.

    Raises:
        ModelError: bad_json or missing_shard.
    """
    weight_map = read_json(directory / index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(v, str) for v in weight_map.values()):
        raise ModelError("bad_json", f"{directory / index}: weight_map must be an object of tensor name to file name")
    names = sorted(set(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ModelError("bad_json", f"{directory / index}: {name!r} is not a plain file name")
        if not (directory / name).is_file():
            raise ModelError("missing_shard", f"{directory / name}: {index} names it, but it is not there")
    return [directory / name for name in names]
