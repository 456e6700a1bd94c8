"""Any model into a directory with safetensors, config.json and a tokenizer, as transformers has them."""

import json
import shutil
from pathlib import Path

import numpy as np
import numpy.typing as npt

from wherry_runtime.formats.conversion.output import Progress, appearing, converted, finish, write_data
from wherry_runtime.formats.conversion.source import Source, SourceTensor
from wherry_runtime.formats.gguf.blocks import dequantized_pieces
from wherry_runtime.formats.gguf.blocks.encode import encode
from wherry_runtime.formats.gguf.types import BY_NAME, BYTES, GGMLType
from wherry_runtime.formats.safetensors.reader import TensorInfo
from wherry_runtime.formats.safetensors.shards import SINGLE
from wherry_runtime.formats.safetensors.writer import encoded_header
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.gguf import describe

CHECKSUMS = "sha256"
_NO_SUM = "0" * 64
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_BESIDE = (
    "generation_config.json", "tokenizer.json", "tokenizer.model", "tokenizer_config.json", "chat_template.jinja",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt",
)  # fmt: skip


def to_safetensors(source: Source, target: Path, wanted: GGMLType | None, progress: Progress) -> dict[str, int]:
    """Writes the model to the directory `target`.

    Args:
        wanted: F32, F16 or BF16; None: what tensors are in, or bfloat16 for what is rounded to less.
        progress: told how many bytes were written.

    Returns: how many tensors there are of each type.

    Raises:
        ModelError: what cannot be converted, or written.
    """
    if wanted is not None and wanted.name not in _FLOATS:
        raise ModelError("unknown_type", f"safetensors here are of {', '.join(_FLOATS)}, not {wanted.name}")
    types = [_target_type(source, tensor, wanted) for tensor in source.tensors]
    infos, offset = [], 0
    for tensor, kind in zip(source.tensors, types, strict=True):
        nbytes = int(np.prod(tensor.shape, dtype=np.int64)) * kind.size
        infos.append(TensorInfo(tensor.name, tensor.shape, kind.name, offset, nbytes))
        offset += nbytes
    start = len(encoded_header(_metadata(infos, [_NO_SUM] * len(infos)), infos))
    with appearing(target, start + offset) as partial:
        partial.mkdir()
        _write_beside(source, partial, wanted)
        with (partial / SINGLE).open("xb") as file:
            data = (
                (info.offset, converted(tensor.read(), tensor.type, kind))
                for tensor, kind, info in zip(source.tensors, types, infos, strict=True)
            )
            sums = write_data(file, data, start, progress)
            finish(file, encoded_header(_metadata(infos, sums), infos))
    return {name: sum(k.name == name for k in types) for name in dict.fromkeys(k.name for k in types)}


def _metadata(infos: list[TensorInfo], sums: list[str]) -> dict[str, str]:
    by_name = {info.name: total for info, total in zip(infos, sums, strict=True)}
    return {"format": "pt", CHECKSUMS: json.dumps(by_name, separators=(",", ":"))}


def _target_type(source: Source, tensor: SourceTensor, wanted: GGMLType | None) -> GGMLType:
    if wanted is not None:
        if tensor.type == BYTES:
            raise ModelError("unsupported_dtype", f"{tensor.name}: is packed and stays so; leave out --type")
        return wanted if tensor.type.name not in ("I8", "I16", "I32", "I64") else tensor.type
    if tensor.type.block > 1:
        return BY_NAME["BF16"]
    own = str(source.config.get("dtype") or source.config.get("torch_dtype"))
    model = next((BY_NAME[name] for name, dtype in _FLOATS.items() if dtype == own), tensor.type)
    # GGUF files have vectors in float32 whatever the model is in: they go back where nothing is lost.
    if source.metadata is not None and tensor.type.name == "F32" and _fits(tensor.read(), model):
        return model
    return tensor.type


def _fits(raw: npt.NDArray[np.uint8], kind: GGMLType) -> bool:
    """Whether float32 values are exactly those of `kind`."""
    try:
        for values in dequantized_pieces(raw, BY_NAME["F32"]):
            back = np.concatenate(list(dequantized_pieces(encode(values, kind), kind)))
            if not np.array_equal(values.view(np.uint32), back.view(np.uint32)):
                return False
    except ModelError:
        return False
    return True


def _write_beside(source: Source, directory: Path, wanted: GGMLType | None) -> None:
    """config.json and the tokenizer's files."""
    config = dict(source.config)
    if wanted is not None:
        config.pop("torch_dtype", None)
        config["dtype"] = _FLOATS[wanted.name]
    _write_json(directory / "config.json", config)
    if source.metadata is None:
        for name in _BESIDE:
            if (path := source.path / name).is_file():
                shutil.copyfile(path, directory / name)
        return
    if source.metadata.get("tokenizer.ggml.model") in (None, "none"):
        return
    description, settings = describe(source.metadata)
    _write_json(directory / "tokenizer.json", description)
    settings |= {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    _write_json(directory / "tokenizer_config.json", settings)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
