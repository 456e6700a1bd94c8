"""Vocabularies of SentencePiece (https://github.com/google/sentencepiece), from whatever file, as a tokenizer."""

import base64
from typing import Any, NamedTuple

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)
SPACE = "▁"


class Piece(NamedTuple):
    """A token: its text, its score (BPE: higher merges first; unigram: log-probability) and what kind it is."""

    text: str
    score: float
    kind: int


class Vocabulary(NamedTuple):
    """A SentencePiece model.

    Attributes:
        unigram: else BPE.
        charsmap: compiled normalization rules; empty: none.
        add_prefix: a space before the text.
        squeeze_spaces: runs of spaces become one, and those at both ends go.
        begin, end: tokens put before and after a text.
    """

    pieces: list[Piece]
    unigram: bool = False
    charsmap: bytes = b""
    add_prefix: bool = True
    squeeze_spaces: bool = False
    begin: int | None = None
    end: int | None = None


def merges(pieces: list[Piece]) -> list[tuple[str, str]]:
    """Every pair of pieces that is a piece itself, best score first.

    SentencePiece merges the neighbours whose union scores best; a list of merges in that order does the same.
    """
    scores = {p.text: p.score for p in pieces if p.kind in (NORMAL, USER_DEFINED)}
    found = []
    for text, score in scores.items():
        pairs = [(text[:i], text[i:]) for i in range(1, len(text))]
        found += [(score, len(left), left, right) for left, right in pairs if left in scores and right in scores]
    found.sort(key=lambda entry: (-entry[0], -entry[1]))
    return [(left, right) for _, _, left, right in found]


def tokenizer_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """The same as a tokenizer.json."""
    pieces = vocabulary.pieces
    unknown = next((i for i, p in enumerate(pieces) if p.kind == UNKNOWN), None)
    has_bytes = sum(p.kind == BYTE for p in pieces) == 256
    model: dict[str, Any]
    if vocabulary.unigram:
        # A byte's name is no text: its piece is for what has no other, so it scores below all that have.
        lowest = min(p.score for p in pieces) - 100
        vocab = [[p.text, lowest if p.kind == BYTE else p.score] for p in pieces]
        model = {"type": "Unigram", "unk_id": unknown, "vocab": vocab, "byte_fallback": has_bytes}
    else:
        ids: dict[str, int] = {}
        for i, piece in enumerate(pieces):
            ids.setdefault(piece.text, i)
        model = {
            "type": "BPE",
            "unk_token": None if unknown is None else pieces[unknown].text,
            "fuse_unk": True,
            "byte_fallback": has_bytes,
            "vocab": ids,
            "merges": merges(pieces),
        }
    return {
        "version": "1.0",
        "added_tokens": [_added(i, p) for i, p in enumerate(pieces) if _stands_alone(p)],
        "normalizer": _normalizer(vocabulary),
        "pre_tokenizer": None,
        "post_processor": template(
            *((None if i is None else (pieces[i].text, i)) for i in (vocabulary.begin, vocabulary.end))
        ),
        "decoder": _decoder(vocabulary.add_prefix),
        "model": model,
    }


def _stands_alone(piece: Piece) -> bool:
    # A run of spaces is found in normalized text, where added tokens are not looked for.
    return piece.kind in (CONTROL, UNKNOWN) or (piece.kind == USER_DEFINED and SPACE not in piece.text)


def _added(index: int, piece: Piece) -> dict[str, Any]:
    return added_token(index, piece.text, special=piece.kind != USER_DEFINED)


def added_token(index: int, text: str, *, special: bool) -> dict[str, Any]:
    """A token that is found in a text before anything else."""
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": index, "content": text, **flags, "special": special}


def _normalizer(vocabulary: Vocabulary) -> dict[str, Any]:
    steps: list[dict[str, Any]] = []
    if vocabulary.charsmap:
        steps.append({"type": "Precompiled", "precompiled_charsmap": base64.b64encode(vocabulary.charsmap).decode()})
    if vocabulary.squeeze_spaces:
        steps.append({"type": "Replace", "pattern": {"Regex": "^ +| +$"}, "content": ""})
        steps.append({"type": "Replace", "pattern": {"Regex": " {2,}"}, "content": " "})
    if vocabulary.add_prefix:
        steps.append({"type": "Prepend", "prepend": SPACE})
    steps.append({"type": "Replace", "pattern": {"String": " "}, "content": SPACE})
    return {"type": "Sequence", "normalizers": steps}


def _decoder(add_prefix: bool) -> dict[str, Any]:
    steps: list[dict[str, Any]] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if add_prefix:
        steps.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {"type": "Sequence", "decoders": steps}


def template(begin: tuple[str, int] | None, end: tuple[str, int] | None) -> dict[str, Any] | None:
    """The `post_processor` that puts a token before and after a text."""
    if begin is None and end is None:
        return None

    def around(kind: int, name: str) -> list[dict[str, Any]]:
        first = [{"SpecialToken": {"id": begin[0], "type_id": kind}}] if begin else []
        last = [{"SpecialToken": {"id": end[0], "type_id": kind}}] if end else []
        return [*first, {"Sequence": {"id": name, "type_id": kind}}, *last]

    special = {text: {"id": text, "ids": [i], "tokens": [text]} for text, i in filter(None, (begin, end))}
    return {
        "type": "TemplateProcessing",
        "single": around(0, "A"),
        "pair": around(0, "A") + around(1, "B"),
        "special_tokens": special,
    }
