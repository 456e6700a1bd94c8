"""A checkpoint's tokenizer as the metadata of a GGUF file: the other way of `tokenization.gguf`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from wherry_runtime.loading.config import read_json, token_ids
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization import wordpiece
from wherry_runtime.tokenization.chat_template import find_template
from wherry_runtime.tokenization.gguf import (
    LOWERCASE,
    ORIGINAL,
    PREFIX,
    ROLES,
    STRIP_ACCENTS,
    TEMPLATE,
    Metadata,
)
from wherry_runtime.tokenization.pieces import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    Piece,
    Vocabulary,
)
from wherry_runtime.tokenization.pre_tokenizers import name_of
from wherry_runtime.tokenization.sources import sentencepiece_vocabulary


def tokenizer_metadata(directory: Path, config: dict[str, Any]) -> Metadata:
    """What a GGUF file says of the tokenizer and the chat template in `directory`; without one, that there is none.

    Args:
        config: the checkpoint's config.json.

    Raises:
        ModelError: bad_tokenizer, unsupported_tokenizer, unknown_pre_tokenizer or bad_chat_template.
    """
    path = directory / "tokenizer_config.json"
    settings = read_json(path) if path.is_file() else {}
    count = int(config["vocab_size"])
    if (path := directory / "tokenizer.json").is_file():
        text = path.read_text()
        try:
            metadata = _from_json(json.loads(text), count)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
            raise ModelError("bad_tokenizer", f"{path}: not a tokenizer: {type(e).__name__}: {e}") from None
        metadata[ORIGINAL] = text
    elif (path := directory / "tokenizer.model").is_file():
        metadata = _from_pieces(sentencepiece_vocabulary(path, settings), count)
    else:
        return {f"{PREFIX}model": "none"}
    tokens = metadata[f"{PREFIX}tokens"]
    metadata |= _roles(directory, config, settings, tokens if isinstance(tokens, list) else [])
    if (source := find_template(directory, settings)) is not None:
        metadata[TEMPLATE] = source
    return metadata


def _roles(directory: Path, config: dict[str, Any], settings: dict[str, Any], tokens: list[str]) -> Metadata:
    ids = {token: i for i, token in enumerate(tokens)}
    found: dict[str, int] = {}
    for name, role in ROLES.items():
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if token in ids:
            found[role] = ids[token]
    if "bos" not in found and isinstance(config.get("bos_token_id"), int):
        found["bos"] = config["bos_token_id"]
    generation = directory / "generation_config.json"
    stops = token_ids(read_json(generation).get("eos_token_id")) if generation.is_file() else ()
    stops = stops or token_ids(config.get("eos_token_id"))
    # GGUF has one end of sequence, and one more for the end of a turn.
    if stops:
        found["eos"] = stops[0]
    if len(stops) > 1:
        found["eot"] = stops[1]
    return {f"{PREFIX}{role}_token_id": i for role, i in found.items() if 0 <= i < len(tokens)}


def _from_json(description: dict[str, Any], count: int) -> Metadata:
    model = description["model"]
    if model["type"] == "WordPiece":
        return _from_wordpiece(description, count)
    if model["type"] != "BPE":
        raise ModelError(
            "unsupported_tokenizer", f"{model['type']} tokenizers are not written to GGUF; BPE and WordPiece ones are"
        )
    tokens, kinds = _tokens(description, count)
    merges = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
    common: Metadata = {f"{PREFIX}tokens": tokens, **_added(*_around(description.get("post_processor")))}
    if '"ByteLevel"' in json.dumps(description.get("pre_tokenizer")):
        name = name_of(description["pre_tokenizer"], bool(model.get("ignore_merges")))
        return {
            f"{PREFIX}model": "gpt2",
            f"{PREFIX}pre": name,
            **common,
            f"{PREFIX}token_type": np.array(kinds, np.int32),
            f"{PREFIX}merges": [" ".join(pair) for pair in merges],
        }
    if not model.get("byte_fallback"):
        raise ModelError("unsupported_tokenizer", "BPE with neither byte level nor byte fallback has no place in GGUF")
    return {
        f"{PREFIX}model": "llama",
        f"{PREFIX}pre": "default",
        **common,
        f"{PREFIX}add_space_prefix": _adds_space(description),
        f"{PREFIX}scores": _scores(tokens, merges),
        f"{PREFIX}token_type": np.array(
            [_piece_kind(t, k, model) for t, k in zip(tokens, kinds, strict=True)], np.int32
        ),
    }


def _from_wordpiece(description: dict[str, Any], count: int) -> Metadata:
    tokens, kinds = _tokens(description, count)
    lowercase, strip_accents = wordpiece.normalization(description)
    begin, end = _around(description.get("post_processor"))
    ids = {token: i for i, token in enumerate(tokens)}
    # Both names of what goes before a text: llama.cpp came to use the other.
    named = {"cls": begin, "bos": begin, "seperator": end, "unknown": ids[description["model"]["unk_token"]]}
    named |= {"padding": ids.get("[PAD]"), "mask": ids.get("[MASK]")}
    return {
        f"{PREFIX}model": "bert",
        f"{PREFIX}pre": "default",
        f"{PREFIX}tokens": wordpiece.to_gguf(tokens, kinds),
        f"{PREFIX}token_type": np.array(kinds, np.int32),
        f"{PREFIX}{LOWERCASE}": lowercase,
        f"{PREFIX}{STRIP_ACCENTS}": strip_accents,
        f"{PREFIX}add_bos_token": begin is not None,
        f"{PREFIX}add_sep_token": end is not None,
        **{f"{PREFIX}{role}_token_id": i for role, i in named.items() if i is not None},
    }


def _tokens(description: dict[str, Any], count: int) -> tuple[list[str], list[int]]:
    """Texts and kinds of `count` tokens; ids that the tokenizer does not have are unused."""
    texts = {i: text for text, i in description["model"]["vocab"].items()}
    kinds = dict.fromkeys(texts, NORMAL)
    for token in description.get("added_tokens") or ():
        texts[token["id"]] = token["content"]
        kinds[token["id"]] = CONTROL if token["special"] else USER_DEFINED
    if texts and max(texts) >= count:
        raise ModelError("bad_tokenizer", f"token {max(texts)} is beyond the model's vocabulary of {count}")
    return [texts.get(i, f"[PAD{i}]") for i in range(count)], [kinds.get(i, UNUSED) for i in range(count)]


def _around(processor: dict[str, Any] | None) -> tuple[int | None, int | None]:
    """The tokens that go before, and after, a text."""
    for step in (processor or {}).get("processors") or [processor or {}]:
        if step.get("type") == "TemplateProcessing":
            single, ids = step["single"], {name: token["ids"][0] for name, token in step["special_tokens"].items()}
            first, last = (ids.get(part.get("SpecialToken", {}).get("id")) for part in (single[0], single[-1]))
            return first, last
        if step.get("type") == "BertProcessing":
            return int(step["cls"][1]), int(step["sep"][1])
    return None, None


def _added(begin: int | None, end: int | None) -> Metadata:
    """What says that tokens go before and after a text, and which."""
    found: Metadata = {f"{PREFIX}add_bos_token": begin is not None, f"{PREFIX}add_eos_token": end is not None}
    return found | {f"{PREFIX}{r}_token_id": i for r, i in (("bos", begin), ("eos", end)) if i is not None}


def _adds_space(description: dict[str, Any]) -> bool:
    text = json.dumps([description.get("normalizer"), description.get("pre_tokenizer")])
    return '"Prepend"' in text or '"prepend_scheme": "first"' in text or '"prepend_scheme": "always"' in text


def _scores(tokens: list[str], merges: list[list[str]]) -> Any:
    """Scores that put merges in the order of the list: [tokens] float32."""
    ids = {token: i for i, token in enumerate(tokens)}
    scores = np.zeros(len(tokens), np.float32)
    for rank, pair in reversed(list(enumerate(merges))):
        scores[ids["".join(pair)]] = -1 - rank
    return scores


def _piece_kind(text: str, kind: int, model: dict[str, Any]) -> int:
    if text == model.get("unk_token"):
        return UNKNOWN
    is_byte = len(text) == 6 and text.startswith("<0x") and text.endswith(">")
    return BYTE if is_byte and kind == NORMAL else kind


def _from_pieces(vocabulary: Vocabulary, count: int) -> Metadata:
    if vocabulary.unigram or vocabulary.charsmap or vocabulary.squeeze_spaces:
        raise ModelError(
            "unsupported_tokenizer", "GGUF has SentencePiece vocabularies of BPE without normalization only"
        )
    pieces = vocabulary.pieces + [Piece(f"[PAD{i}]", 0, UNUSED) for i in range(len(vocabulary.pieces), count)]
    if len(pieces) > count:
        raise ModelError("bad_tokenizer", f"{len(pieces)} tokens are more than the model's vocabulary of {count}")
    return {
        f"{PREFIX}model": "llama",
        f"{PREFIX}pre": "default",
        f"{PREFIX}tokens": [p.text for p in pieces],
        **_added(vocabulary.begin, vocabulary.end),
        f"{PREFIX}add_space_prefix": vocabulary.add_prefix,
        f"{PREFIX}scores": np.array([p.score for p in pieces], np.float32),
        f"{PREFIX}token_type": np.array([p.kind for p in pieces], np.int32),
    }
