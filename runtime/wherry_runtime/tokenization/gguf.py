"""The tokenizer in a GGUF file's metadata, as a tokenizer.json: byte-level BPE (`gpt2`), SentencePiece (`llama` is BPE,
`t5` unigram) and WordPiece (`bert`)."""

import json
from typing import Any

import numpy as np

from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization import wordpiece
from wherry_runtime.tokenization.pieces import (
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
    Piece,
    Vocabulary,
    added_token,
    template,
    tokenizer_json,
)
from wherry_runtime.tokenization.pre_tokenizers import as_json, pre_tokenizer

Metadata = dict[str, Value]
PREFIX = "tokenizer.ggml."
ORIGINAL = "tokenizer.huggingface.json"
TEMPLATE = "tokenizer.chat_template"
# llama.cpp spells one of them so.
ROLES = {
    "bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding", "cls_token": "cls",
    "sep_token": "seperator", "mask_token": "mask",
}  # fmt: skip
LOWERCASE, STRIP_ACCENTS = "normalizer.lowercase", "normalizer.strip_accents"


def describe(metadata: Metadata) -> tuple[dict[str, Any], dict[str, Any]]:
    """What tokenizer.json and tokenizer_config.json would say.

    A tokenizer.json that the file carries is taken if it has the file's own tokens.

    Raises:
        ModelError: missing_tokenizer, bad_tokenizer, unsupported_tokenizer or unknown_pre_tokenizer.
    """
    model = metadata.get(f"{PREFIX}model")
    tokens = metadata.get(f"{PREFIX}tokens")
    if model in (None, "none") or not isinstance(tokens, list) or not tokens:
        raise ModelError("missing_tokenizer", "the GGUF file has no vocabulary; convert the model with its tokenizer")
    if model == "gpt2":
        description = _byte_level(metadata, tokens)
    elif model in ("llama", "t5"):
        description = _sentencepiece(metadata, tokens, unigram=model == "t5")
    elif model == "bert":
        tokens = wordpiece.from_gguf(tokens, _kinds(metadata, len(tokens)))
        description = _wordpiece(metadata, tokens)
    else:
        raise ModelError(
            "unsupported_tokenizer", f"tokenizer model {model!r} is not supported; gpt2, llama, t5 and bert are"
        )
    if isinstance(original := metadata.get(ORIGINAL), str):
        description = _checked(original, tokens)
    return description, _settings(metadata, tokens)


def _settings(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    settings: dict[str, Any] = {}
    for name, key in ROLES.items():
        if (index := token_id(metadata, key, len(tokens))) is not None:
            settings[name] = tokens[index]
    if isinstance(source := metadata.get(TEMPLATE), str):
        settings["chat_template"] = source
    return settings


def token_id(metadata: Metadata, role: str, count: int) -> int | None:
    """The id of the token for `role` (bos, eos, …), if the file names one.

    Raises:
        ModelError: bad_tokenizer, when it is no token.
    """
    index = metadata.get(f"{PREFIX}{role}_token_id")
    if index is None:
        return None
    if isinstance(index, bool) or not isinstance(index, int) or not 0 <= index < count:
        raise ModelError("bad_tokenizer", f"{PREFIX}{role}_token_id is {index!r} of {count} tokens")
    return index


def _flag(metadata: Metadata, name: str, default: bool) -> bool:
    value = metadata.get(f"{PREFIX}{name}", default)
    if not isinstance(value, bool):
        raise ModelError("bad_tokenizer", f"{PREFIX}{name} is {value!r}; true or false is expected")
    return value


def _numbers(metadata: Metadata, name: str, count: int) -> list[Any]:
    values = metadata.get(f"{PREFIX}{name}")
    if not isinstance(values, np.ndarray) or len(values) != count:
        raise ModelError("bad_tokenizer", f"{PREFIX}{name} is not one number for each of {count} tokens")
    return list(values.tolist())


def _kinds(metadata: Metadata, count: int) -> list[int]:
    return _numbers(metadata, "token_type", count) if f"{PREFIX}token_type" in metadata else [NORMAL] * count


def _around(metadata: Metadata, tokens: list[str], *, add_bos: bool, add_eos: bool = False) -> list[int | None]:
    """Ids of what goes before and after a text."""
    wanted = {"bos": _flag(metadata, "add_bos_token", add_bos), "eos": _flag(metadata, "add_eos_token", add_eos)}
    return [token_id(metadata, role, len(tokens)) if add else None for role, add in wanted.items()]


def _byte_level(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    pre = pre_tokenizer(str(metadata.get(f"{PREFIX}pre", "default")))
    merges = metadata.get(f"{PREFIX}merges")
    if not isinstance(merges, list):
        raise ModelError("bad_tokenizer", f"{PREFIX}merges is missing")
    kinds = _kinds(metadata, len(tokens))
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    pairs = [merge.split(" ", 1) for merge in merges]
    if any(len(pair) != 2 or not {*pair, "".join(pair)} <= ids.keys() for pair in pairs):
        raise ModelError("bad_tokenizer", f"{PREFIX}merges has one whose parts or whole are no tokens")
    alone = [(i, t, k) for i, (t, k) in enumerate(zip(tokens, kinds, strict=True)) if k in (CONTROL, USER_DEFINED)]
    around = _around(metadata, tokens, add_bos=pre.add_bos)
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, text, special=kind == CONTROL) for i, text, kind in alone],
        "normalizer": None,
        "pre_tokenizer": as_json(pre),
        "post_processor": template(*(None if i is None else (tokens[i], i) for i in around)),
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {"type": "BPE", "vocab": ids, "merges": pairs, "ignore_merges": pre.whole_words},
    }


def _sentencepiece(metadata: Metadata, tokens: list[str], *, unigram: bool) -> dict[str, Any]:
    scores, kinds = (_numbers(metadata, name, len(tokens)) for name in ("scores", "token_type"))
    if UNKNOWN not in kinds and (unknown := token_id(metadata, "unknown", len(tokens))) is not None:
        kinds[unknown] = UNKNOWN
    begin, end = _around(metadata, tokens, add_bos=not unigram, add_eos=unigram)
    charsmap = metadata.get(f"{PREFIX}precompiled_charsmap")
    if unigram and not (all(np.isfinite(scores)) and UNKNOWN in kinds):
        raise ModelError("bad_tokenizer", "a unigram vocabulary has finite scores, and a token for what is unknown")
    return tokenizer_json(
        Vocabulary(
            [Piece(*piece) for piece in zip(tokens, scores, kinds, strict=True)],
            unigram=unigram,
            charsmap=charsmap.tobytes() if unigram and isinstance(charsmap, np.ndarray) else b"",
            add_prefix=_flag(metadata, "add_space_prefix", True),
            squeeze_spaces=unigram and _flag(metadata, "remove_extra_whitespaces", False),
            begin=begin,
            end=end,
        )
    )


def _wordpiece(metadata: Metadata, tokens: list[str]) -> dict[str, Any]:
    ids = {token: i for i, token in enumerate(tokens)}

    def named(text: str, *roles: str) -> int | None:
        found = (token_id(metadata, role, len(tokens)) for role in roles)
        return next((i for i in found if i is not None), ids.get(text))

    unknown = named("[UNK]", "unknown")
    if unknown is None:
        raise ModelError("bad_tokenizer", "the vocabulary has no token for words that are unknown")
    kinds = _kinds(metadata, len(tokens))
    begin = named("[CLS]", "cls", "bos") if _flag(metadata, "add_bos_token", True) else None
    end = named("[SEP]", "seperator", "eos") if _flag(metadata, "add_sep_token", True) else None
    return wordpiece.tokenizer_json(
        tokens,
        [i for i, kind in enumerate(kinds) if kind == CONTROL and tokens[i]],
        unknown,
        (begin, end),
        lowercase=_flag(metadata, LOWERCASE, True),
        strip_accents=_flag(metadata, STRIP_ACCENTS, _flag(metadata, LOWERCASE, True)),
    )


def _checked(original: str, tokens: list[str]) -> dict[str, Any]:
    try:
        description = json.loads(original)
        own = description["model"]["vocab"]
        own = {token: i for i, (token, _) in enumerate(own)} if isinstance(own, list) else own  # unigram
        vocab = {**own, **{t["content"]: t["id"] for t in description["added_tokens"]}}
        fits = all(0 <= i < len(tokens) and tokens[i] == token for token, i in vocab.items())
    except (ValueError, TypeError, KeyError, RecursionError) as e:
        raise ModelError("bad_tokenizer", f"{ORIGINAL} does not read: {e}") from None
    if not fits:
        raise ModelError("bad_tokenizer", f"{ORIGINAL} has other tokens than the file's vocabulary")
    return dict(description)
