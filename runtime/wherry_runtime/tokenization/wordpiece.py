"""WordPiece vocabularies (https://arxiv.org/abs/1609.08144) as BERT has them, in GGUF and in a tokenizer.json.

A checkpoint marks tokens that go on within a word (`##ing`), GGUF those that begin one (`▁run`).
"""

from typing import Any

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.pieces import CONTROL, SPACE, UNUSED, added_token, template

INSIDE = "##"
_LONGEST_WORD = 100  # characters, as all of BERT's have it; longer ones are unknown


def from_gguf(tokens: list[str], kinds: list[int]) -> list[str]:
    """The tokens as a checkpoint has them."""
    return [_plain(token, kind) for token, kind in zip(tokens, kinds, strict=True)]


def _plain(token: str, kind: int) -> str:
    if token.startswith(SPACE) and kind != CONTROL:
        return token.removeprefix(SPACE)
    # Early files mark what is in brackets as text; it begins no word and goes on within none.
    return token if kind in (CONTROL, UNUSED) or (token[:1], token[-1:]) == ("[", "]") else INSIDE + token


def to_gguf(tokens: list[str], kinds: list[int]) -> list[str]:
    """The tokens as GGUF has them."""

    def marked(token: str, kind: int) -> str:
        if kind in (CONTROL, UNUSED):
            return token
        return token.removeprefix(INSIDE) if token.startswith(INSIDE) else SPACE + token

    return [marked(token, kind) for token, kind in zip(tokens, kinds, strict=True)]


def tokenizer_json(
    tokens: list[str],
    alone: list[int],
    unknown: int,
    around: tuple[int | None, int | None],
    *,
    lowercase: bool,
    strip_accents: bool,
) -> dict[str, Any]:
    """The tokenizer.json of a vocabulary.

    Args:
        tokens: as a checkpoint has them.
        alone: ids of those that are found in a text before anything else.
        unknown: id of that for words that no others make.
        around: ids of what goes before and after a text.
    """
    ids: dict[str, int] = {}
    for i, token in enumerate(tokens):
        ids.setdefault(token, i)
    begin, end = (None if i is None else (tokens[i], i) for i in around)
    return {
        "version": "1.0",
        "added_tokens": [added_token(i, tokens[i], special=True) for i in alone],
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": strip_accents,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "post_processor": template(begin, end),
        "decoder": {"type": "WordPiece", "prefix": INSIDE, "cleanup": True},
        "model": {
            "type": "WordPiece",
            "unk_token": tokens[unknown],
            "continuing_subword_prefix": INSIDE,
            "max_input_chars_per_word": _LONGEST_WORD,
            "vocab": ids,
        },
    }


def normalization(description: dict[str, Any]) -> tuple[bool, bool]:
    """Whether the tokenizer of a tokenizer.json lowercases, and whether it strips accents.

    Raises:
        ModelError: unsupported_tokenizer, where it splits or normalizes text otherwise than GGUF can say.
    """
    normalizer, splitter = description.get("normalizer") or {}, description.get("pre_tokenizer") or {}
    known = normalizer.get("type") == "BertNormalizer" and splitter.get("type") == "BertPreTokenizer"
    usual = normalizer.get("clean_text", True) and normalizer.get("handle_chinese_chars", True)
    if not known or not usual or description["model"].get("continuing_subword_prefix", INSIDE) != INSIDE:
        raise ModelError("unsupported_tokenizer", "GGUF has WordPiece tokenizers that split text as BERT's do only")
    lowercase = bool(normalizer.get("lowercase", True))
    accents = normalizer.get("strip_accents")
    return lowercase, lowercase if accents is None else bool(accents)
