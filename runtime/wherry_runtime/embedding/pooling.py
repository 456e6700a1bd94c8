"""From a text's rows to its vector, as the checkpoint's sentence-transformers files say
(Reimers and Gurevych, 2019, https://arxiv.org/abs/1908.10084)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import msgspec
import torch
from torch.nn import functional

from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError

Kind = Literal["cls", "mean", "max", "last"]
# In `1_Pooling/config.json`, each a flag.
_KINDS: dict[str, Kind] = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_lasttoken": "last",
}
# The same, where it is one word.
_WORDS: dict[str, Kind] = {"cls": "cls", "mean": "mean", "max": "max", "lasttoken": "last"}
_GGUF: dict[str, Kind] = {"cls": "cls", "mean": "mean", "last": "last"}
# [texts, length, width] → [texts, width]
_POOLED: dict[Kind, Callable[[torch.Tensor], torch.Tensor]] = {
    "cls": lambda rows: rows[:, 0],
    "mean": lambda rows: rows.float().mean(1),
    "max": lambda rows: rows.amax(1),
    "last": lambda rows: rows[:, -1],
}
_KNOWN_MODULES = ("Transformer", "Pooling", "Normalize")


class Pooling(msgspec.Struct, frozen=True, kw_only=True):
    """How vectors are made of a text's rows.

    Attributes:
        normalize: whether vectors have length 1.
        max_length: tokens of a text; 0: not said.
        lowercase: whether texts are, before they are tokenized.
        shortened: lengths that vectors may be cut to (Matryoshka, https://arxiv.org/abs/2205.13147); True: any.
    """

    kind: Kind = "mean"
    normalize: bool = True
    max_length: int = 0
    lowercase: bool = False
    shortened: bool | tuple[int, ...] = False

    def allows(self, dimensions: int, width: int) -> bool:
        """Whether vectors of `width` numbers may be cut to `dimensions`."""
        if dimensions == width or (self.shortened is True and 0 < dimensions < width):
            return True
        return isinstance(self.shortened, tuple) and dimensions in self.shortened and dimensions < width

    def pooled(self, rows: torch.Tensor) -> torch.Tensor:
        """rows [texts, length, width] → [texts, width] float32, not normalized yet."""
        return _POOLED[self.kind](rows).float()

    def finish(self, vectors: torch.Tensor) -> torch.Tensor:
        """vectors [..., width], cut or not → the same, of length 1 where they are normalized."""
        return functional.normalize(vectors, dim=-1) if self.normalize else vectors


def read_pooling(directory: Path, raw: dict[str, Any]) -> Pooling:
    """What the files say: `modules.json`, the pooling's `config.json`, `sentence_bert_config.json`; without these the
    mean of all rows, normalized, or what a GGUF file says in place of it.

    Args:
        raw: `config.json`, which says by `is_matryoshka` or `matryoshka_dimensions` what vectors may be cut to, and by
            `pooling_type`, where it is that of a GGUF file, what they are made of.

    Raises:
        ModelError: bad_json, bad_config, unsupported_module or unsupported_pooling.
    """
    shortened = _shortened(raw, directory)
    if not directory.is_dir() or not (directory / "modules.json").is_file():
        return Pooling(kind=_GGUF.get(str(raw.get("pooling_type")), "mean"), shortened=shortened)
    modules = _modules(directory / "modules.json")
    kind: Kind = "mean"
    if (path := modules.get("Pooling")) is not None:
        kind = _kind(directory / path / "config.json")
    settings = _transformer(directory / modules.get("Transformer", ""))
    length, lowercase = settings.get("max_seq_length"), settings.get("do_lower_case")
    return Pooling(
        kind=kind,
        normalize="Normalize" in modules,
        max_length=length if isinstance(length, int) and length > 0 else 0,
        lowercase=lowercase is True,
        shortened=shortened,
    )


def _modules(path: Path) -> dict[str, str]:
    """The last part of each module's type → its directory."""
    try:
        listed = msgspec.json.decode(path.read_bytes(), type=list[dict[str, Any]])
        found = {str(one["type"]).rpartition(".")[2]: str(one.get("path", "")) for one in listed}
    except (msgspec.DecodeError, KeyError) as e:
        raise ModelError("bad_json", f"{path}: not a list of modules: {e}") from e
    unknown = [name for name in found if name not in _KNOWN_MODULES]
    if unknown:
        known = ", ".join(_KNOWN_MODULES)
        raise ModelError("unsupported_module", f"{path}: the module {unknown[0]} is not supported; {known} are")
    if any(Path(one).is_absolute() or ".." in Path(one).parts for one in found.values()):
        raise ModelError("bad_config", f"{path}: a module is outside of the model's directory")
    return found


def _kind(path: Path) -> Kind:
    raw = read_json(path)
    word = raw.get("pooling_mode")
    chosen = [str(word)] if word is not None else [k for k, v in raw.items() if k.startswith("pooling_mode_") and v]
    kinds = [_WORDS.get(name) if word is not None else _KINDS.get(name) for name in chosen]
    if len(kinds) != 1 or kinds[0] is None:
        raise ModelError(
            "unsupported_pooling",
            f"{path}: {' and '.join(chosen) or 'no pooling'} is not supported; one of {', '.join(_KINDS)} is",
        )
    if raw.get("include_prompt") is False:
        raise ModelError("unsupported_pooling", f"{path}: include_prompt = false is not supported")
    return kinds[0]


def _transformer(directory: Path) -> dict[str, Any]:
    path = directory / "sentence_bert_config.json"
    return read_json(path) if path.is_file() else {}


def _shortened(raw: dict[str, Any], directory: Path) -> bool | tuple[int, ...]:
    sizes = raw.get("matryoshka_dimensions")
    if sizes is None:
        return raw.get("is_matryoshka") is True
    if not isinstance(sizes, list) or not all(type(size) is int and size > 0 for size in sizes):
        raise ModelError("bad_config", f"{directory}: matryoshka_dimensions {sizes!r} is no list of lengths")
    return tuple(sizes)
