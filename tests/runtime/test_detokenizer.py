"""Text that comes token by token: whole characters, cut at the first stop string wherever tokens split it."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.engines import TINY
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, models

from wherry_runtime.tokenization.detokenizer import Detokenizer
from wherry_runtime.tokenization.tokenizer import Tokenizer

TOKENIZER = Tokenizer(TINY)


def stream(tokenizer: Tokenizer, ids: list[int], stop: list[str]) -> tuple[list[str], str | None]:
    detokenizer = Detokenizer(tokenizer, stop)
    parts = [detokenizer.push(i) for i in ids]
    return [*parts, detokenizer.finish()], detokenizer.matched


def cut(text: str, stop: list[str]) -> str:
    """`text` up to the first stop string."""
    return text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.integers(0, 8191), max_size=40),
    st.lists(st.text(min_size=1, max_size=4), max_size=3),
    st.data(),
)
def test_any_tokens_give_the_decoded_text_cut_at_the_first_stop(
    ids: list[int], stop: list[str], data: st.DataObject
) -> None:
    decoded = TOKENIZER.decode(ids)
    if decoded and data.draw(st.booleans()):
        at = data.draw(st.integers(0, len(decoded) - 1))
        stop = [*stop, decoded[at : at + data.draw(st.integers(1, 8))]]
    parts, matched = stream(TOKENIZER, ids, stop)
    assert "".join(parts) == cut(decoded, stop)
    assert (matched is not None) == any(s in decoded for s in stop)


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=60))
def test_whole_characters_only(text: str) -> None:
    parts, _ = stream(TOKENIZER, TOKENIZER.encode(text), [])
    assert "".join(parts) == text
    if "�" not in text:
        assert not any("�" in part for part in parts)


def one_byte_tokens(data: bytes) -> list[int]:
    """A token for each byte."""
    table = {TOKENIZER.token_bytes(i): i for i in range(8192) if not TOKENIZER.is_special(i)}
    return [table[bytes([b])] for b in data]


@pytest.mark.parametrize(
    ("data", "stop", "parts", "matched"),
    [
        ("a€b".encode(), [], ["a", "", "", "€", "b", ""], None),
        ("👋🏽".encode(), [], ["", "", "", "👋", "", "", "", "🏽", ""], None),
        (b"ab\xff", [], ["a", "b", "�", ""], None),
        (b"ab\xe2\x82", [], ["a", "b", "", "", "�"], None),
        (b"xSTOy", ["STOP"], ["x", "", "", "", "STOy", ""], None),
        (b"xSTOPy", ["STOP"], ["x", "", "", "", "", "", ""], "STOP"),
        (b"xST", ["STOP"], ["x", "", "", "ST"], None),
        (b"aab", ["aab", "ab"], ["", "", "", ""], "aab"),
        (b"xaab", ["ab"], ["x", "", "a", "", ""], "ab"),
        ("é!".encode(), ["é"], ["", "", "", ""], "é"),
    ],
)
def test_what_is_held_back(data: bytes, stop: list[str], parts: list[str], matched: str | None) -> None:
    assert stream(TOKENIZER, one_byte_tokens(data), stop) == (parts, matched)


def test_special_tokens_have_no_text_but_a_name() -> None:
    assert TOKENIZER.token_bytes(2) == b"<|im_end|>"
    assert stream(TOKENIZER, [2, *TOKENIZER.encode("hi"), 0], [])[0][0] == ""
    assert TOKENIZER.token_bytes(10**9) == b""


def test_stop_strings_wait_for_min_tokens() -> None:
    detokenizer = Detokenizer(TOKENIZER, ["b"])
    texts = [detokenizer.push(i, may_stop=n >= 2) for n, i in enumerate(one_byte_tokens(b"bbab"))]
    assert texts == ["b", "b", "a", ""]
    assert detokenizer.matched == "b"


def test_sentencepiece_with_byte_fallback(tmp_path: Path) -> None:
    """The kind of tokenizer that Llama 2 and Mistral have."""
    pieces = ["<unk>", "▁Hello", "▁wor", "ld", *(f"<0x{b:02X}>" for b in range(256))]
    fast = FastTokenizer(
        models.BPE(vocab={p: i for i, p in enumerate(pieces)}, merges=[], unk_token="<unk>", byte_fallback=True)
    )
    fast.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer = Tokenizer(tmp_path)
    ids = [1, 2, 3, *(4 + b for b in "€".encode())]
    detokenizer = Detokenizer(tokenizer, strip_leading_space=True)
    assert [detokenizer.push(i) for i in ids] == ["Hello", " wor", "ld", "", "", "€"]
    assert tokenizer.decode(ids) == "Hello world€"
    assert Detokenizer(tokenizer).push(1) == " Hello"
