"""Where a model's tokenizer is: `tokenizer.json`, `tokenizer.model` (SentencePiece) or a GGUF file's metadata."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wherry_runtime.formats.detect import gguf_files
from wherry_runtime.formats.gguf.reader import GGUFFile
from wherry_runtime.loading.config import read_json
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.gguf import describe
from wherry_runtime.tokenization.pieces import Vocabulary, tokenizer_json
from wherry_runtime.tokenization.sentencepiece import read_model


@dataclass(frozen=True)
class TokenizerSource:
    """A tokenizer that was found.

    Attributes:
        path: the file that it is in.
        settings: what tokenizer_config.json says, or would say.
        text: gives what tokenizer.json says, or would say.
    """

    path: Path
    settings: dict[str, Any]
    text: Callable[[], str]


def find_tokenizer(model: Path) -> TokenizerSource:
    """The tokenizer of a model, which is a directory or a GGUF file.

    Raises:
        ModelError: missing_tokenizer, unsupported_tokenizer, unknown_pre_tokenizer, bad_tokenizer or bad_json.
    """
    config = model / "tokenizer_config.json"
    settings = read_json(config) if config.is_file() else {}
    if (path := model / "tokenizer.json").is_file():
        return TokenizerSource(path, settings, path.read_text)
    if (path := model / "tokenizer.model").is_file():
        description = tokenizer_json(sentencepiece_vocabulary(path, settings))
        return TokenizerSource(path, settings, lambda: json.dumps(description))
    if files := gguf_files(model):
        try:
            description, found = describe(GGUFFile.open(files[0]).header.metadata)
        except ModelError as e:
            raise ModelError(e.code, f"{files[0]}: {e.message}") from None
        return TokenizerSource(files[0], {**found, **settings}, lambda: json.dumps(description))
    raise ModelError(
        "missing_tokenizer", f"{path.with_name('tokenizer.json')}: not found, nor is there a tokenizer.model"
    )


def sentencepiece_vocabulary(path: Path, settings: dict[str, Any]) -> Vocabulary:
    """The vocabulary of a `tokenizer.model`, with BOS and EOS where tokenizer_config.json says so (by default BOS).

    Raises:
        ModelError: bad_tokenizer.
    """
    vocabulary = read_model(path)
    ids = {piece.text: i for i, piece in enumerate(vocabulary.pieces)}

    def token(role: str, default: str) -> int | None:
        named = settings.get(f"{role}_token", default)
        return ids.get(str(named.get("content") if isinstance(named, dict) else named))

    begin = token("bos", "<s>") if settings.get("add_bos_token", True) else None
    end = token("eos", "</s>") if settings.get("add_eos_token", False) else None
    return vocabulary._replace(begin=begin, end=end)
