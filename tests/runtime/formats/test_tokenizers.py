"""Tokenizers from SentencePiece and GGUF: the ids that sentencepiece and tokenizers give, on text made to be hard."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from tests.runtime.engines import TINY
from tests.runtime.formats.corpus import corpus
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.writer import encoded_header
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.gguf import ORIGINAL
from wherry_runtime.tokenization.pre_tokenizers import PRE_TOKENIZERS, pre_tokenizer
from wherry_runtime.tokenization.sentencepiece import read_model
from wherry_runtime.tokenization.to_gguf import tokenizer_metadata
from wherry_runtime.tokenization.tokenizer import Tokenizer

TEXTS = corpus(60_000)


def train(directory: Path, **settings: Any) -> sentencepiece.SentencePieceProcessor:
    """A small model of sentencepiece, saved as `tokenizer.model`."""
    (directory / "text").write_text("\n".join(t.replace("\x00", "") for t in corpus(30_000, seed=1, wild=0)))
    defaults = {
        "model_type": "bpe",
        "vocab_size": 1200,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
        "num_threads": 1,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(directory / "text"), model_prefix=str(directory / "tokenizer"), **{**defaults, **settings}
    )
    return sentencepiece.SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))


LLAMA = {"split_digits": True, "allow_whitespace_only_pieces": True}
MODELS = {
    "llama": LLAMA,
    "no prefix": {**LLAMA, "add_dummy_prefix": False},
    "no bytes": {"byte_fallback": False},
    "user defined": {**LLAMA, "user_defined_symbols": ["<|im_start|>", "[INST]"]},
    "unigram": {"model_type": "unigram", "vocab_size": 600},
}


@pytest.mark.parametrize("name", MODELS)
def test_sentencepiece_models(tmp_path: Path, name: str) -> None:
    theirs = train(tmp_path, **MODELS[name])
    ours = Tokenizer(tmp_path)
    assert ours.vocab_size == theirs.vocab_size()
    markup = ("<s>", "</s>", "<unk>")  # found in text here, as models are trained; not by sentencepiece
    for text in TEXTS:
        if any(m in text for m in markup) or (name == "user defined" and ("<|im" in text or "[INST]" in text)):
            continue
        assert ours.encode(text, special_tokens=False) == theirs.encode(text), repr(text)
    assert ours.encode("a")[0] == theirs.bos_id()
    if name == "user defined":
        assert ours.encode("[INST]", special_tokens=False)[-1] == theirs.piece_to_id("[INST]")


def test_sentencepiece_models_decode_as_they_do(tmp_path: Path) -> None:
    theirs = train(tmp_path, **LLAMA)
    ours = Tokenizer(tmp_path)
    for text in ("東京 is 😀 a\tcity\n", "  two", "\x01é"):
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) == text
        assert b"".join(ours.token_bytes(i) for i in ids).decode() == " " + text


@pytest.mark.parametrize("data", [b"", b"\x0a", b"\x0a\xff\xff\xff\xff\x7f", b"\xff" * 20, b"\x0b\x00", b"hello world"])
def test_what_is_no_sentencepiece_model(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(ModelError) as failure:
        Tokenizer(tmp_path)
    assert failure.value.code == "bad_tokenizer"


def test_truncated_sentencepiece_models_are_refused_or_shorter(tmp_path: Path) -> None:
    train(tmp_path, **LLAMA)
    path = tmp_path / "tokenizer.model"
    data = path.read_bytes()
    whole, codes = len(read_model(path).pieces), set()
    for size in random.Random(0).sample(range(len(data)), 100):
        path.write_bytes(data[:size])
        try:
            assert len(read_model(path).pieces) <= whole
        except ModelError as e:
            codes.add(e.code)
    assert codes == {"bad_tokenizer"}


def as_gguf(path: Path, metadata: dict[str, Value]) -> Path:
    path.write_bytes(encoded_header({"general.architecture": "llama", **metadata}, []))
    return path


def without_original(metadata: dict[str, Value]) -> dict[str, Value]:
    return {k: v for k, v in metadata.items() if k != ORIGINAL}


@pytest.mark.parametrize("carried", [True, False])
def test_the_sample_models_tokenizer_through_gguf(tmp_path: Path, carried: bool) -> None:
    metadata = tokenizer_metadata(TINY, {"vocab_size": 8192})
    ours = Tokenizer(as_gguf(tmp_path / "t.gguf", metadata if carried else without_original(metadata)))
    theirs = Tokenizer(TINY)
    assert ours.differs_from(theirs) is None
    for text in TEXTS:
        assert ours.encode(text) == theirs.encode(text), repr(text)
    assert ours.settings["eos_token"] == "<|endoftext|>"
    assert ours.settings["chat_template"] == theirs.settings["chat_template"]
    assert [ours.is_special(i) for i in range(5)] == [theirs.is_special(i) for i in range(5)]


# What those families' own tokenizer.json have.
GPT2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
STARCODER = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), GPT2])
UNSPLIT = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
BLOOM = pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated")
ORIGINALS: dict[str, tuple[Any, bool]] = {
    "gpt-2": (GPT2, False),
    "bloom": (pre_tokenizers.Sequence([BLOOM, UNSPLIT]), False),
    "starcoder": (STARCODER, False),
    "llama-bpe": (
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(
                    Regex(
                        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
                        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
                    ),
                    "isolated",
                ),
                UNSPLIT,
            ]
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", ORIGINALS)
def test_byte_level_bpe_through_gguf(tmp_path: Path, name: str) -> None:
    splitter, whole_words = ORIGINALS[name]
    fast = Fast(models.BPE(ignore_merges=whole_words))
    fast.pre_tokenizer, fast.decoder = splitter, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    fast.train_from_iterator(corpus(30_000, seed=2), trainer)
    fast.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": 910})
    assert metadata["tokenizer.ggml.pre"] == name
    ours = Tokenizer(as_gguf(tmp_path / "t.gguf", without_original(metadata)))
    for text in TEXTS:
        assert ours.encode(text, special_tokens=False) == fast.encode(text, add_special_tokens=False).ids, repr(text)


def test_sentencepiece_through_gguf(tmp_path: Path) -> None:
    theirs = train(tmp_path, **LLAMA)
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": theirs.vocab_size() + 16})
    assert metadata["tokenizer.ggml.model"] == "llama"
    ours, plain = Tokenizer(as_gguf(tmp_path / "t.gguf", metadata)), Tokenizer(tmp_path)
    for text in TEXTS:
        assert ours.encode(text) == plain.encode(text), repr(text)
    # The same from a tokenizer.json, as transformers makes them.
    (tmp_path / "tokenizer.json").write_text(plain._fast.to_str())
    again = tokenizer_metadata(tmp_path, {"vocab_size": theirs.vocab_size()})
    ours = Tokenizer(as_gguf(tmp_path / "u.gguf", without_original(again)))
    for text in TEXTS[:300]:
        assert ours.encode(text) == plain.encode(text), repr(text)


def bpe(**changes: Value | None) -> dict[str, Value]:
    metadata: dict[str, Value | None] = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.tokens": ["a", "b", "ab", "<s>"],
        "tokenizer.ggml.merges": ["a b"],
        "tokenizer.ggml.token_type": np.array([1, 1, 1, 3], np.int32),
        **{f"tokenizer.ggml.{k}": v for k, v in changes.items()},
    }
    return {k: v for k, v in metadata.items() if v is not None}


BAD: dict[str, tuple[dict[str, Value], str, str]] = {
    "no vocabulary": (bpe(tokens=None), "missing_tokenizer", "no vocabulary"),
    "none": (bpe(model="none"), "missing_tokenizer", "no vocabulary"),
    "another model": (bpe(model="rwkv"), "unsupported_tokenizer", "'rwkv'"),
    "an unknown pre-tokenizer": (bpe(pre="llama-bpee"), "unknown_pre_tokenizer", "nearest is llama-bpe"),
    "no merges": (bpe(merges=None), "bad_tokenizer", "merges"),
    "merges of no tokens": (bpe(merges=["a c"]), "bad_tokenizer", "merges"),
    "merges of one part": (bpe(merges=["ab"]), "bad_tokenizer", "merges"),
    "types of some": (bpe(token_type=np.array([1], np.int32)), "bad_tokenizer", "token_type"),
    "a BOS that is no token": (bpe(bos_token_id=9), "bad_tokenizer", "bos_token_id is 9"),
    "no scores": (bpe(model="llama"), "bad_tokenizer", "scores"),
}


@pytest.mark.parametrize("name", BAD)
def test_broken_tokenizers_in_gguf(tmp_path: Path, name: str) -> None:
    metadata, code, message = BAD[name]
    with pytest.raises(ModelError, match=message) as failure:
        Tokenizer(as_gguf(tmp_path / "t.gguf", metadata))
    assert failure.value.code == code


def test_an_original_with_other_tokens_is_refused(tmp_path: Path) -> None:
    metadata = bpe() | {ORIGINAL: (TINY / "tokenizer.json").read_text()}
    with pytest.raises(ModelError, match="other tokens"):
        Tokenizer(as_gguf(tmp_path / "t.gguf", metadata))


def test_bos_and_eos_go_where_the_file_says(tmp_path: Path) -> None:
    cases: list[tuple[dict[str, Value], list[int]]] = [
        (bpe(bos_token_id=3), [2]),
        (bpe(bos_token_id=3, add_bos_token=True), [3, 2]),
        (bpe(eos_token_id=3, add_eos_token=True), [2, 3]),
        (bpe(bos_token_id=3, pre="llama-bpe"), [3, 2]),
        (bpe(bos_token_id=3, pre="llama-bpe", add_bos_token=False), [2]),
    ]
    for metadata, expected in cases:
        assert Tokenizer(as_gguf(tmp_path / "t.gguf", metadata)).encode("ab") == expected


def test_every_pre_tokenizer_splits() -> None:
    assert {pre_tokenizer(name) for name in PRE_TOKENIZERS} == set(PRE_TOKENIZERS.values())
    with pytest.raises(ModelError, match=r"Known: .*qwen2"):
        pre_tokenizer("nothing like it")
