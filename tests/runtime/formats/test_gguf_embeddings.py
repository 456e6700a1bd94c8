"""Embedding models in GGUF: their tokenizers, their pooling, their vectors. What llama.cpp makes of the same file:
`benchmarks/gguf_architectures.py`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file
from tests.runtime.encoders import BERT, WORDS, Case, save_modules
from tests.runtime.formats.test_tokenizers import TEXTS, as_gguf, train, without_original
from tokenizers import AddedToken
from tokenizers import Tokenizer as Fast

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.embedding.model import load_embedder
from wherry_runtime.formats.conversion.source import open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.conversion.to_safetensors import to_safetensors
from wherry_runtime.formats.gguf.cursor import Value
from wherry_runtime.formats.gguf.reader import GGUFFile
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.tokenization.sentencepiece import read_model
from wherry_runtime.tokenization.to_gguf import tokenizer_metadata
from wherry_runtime.tokenization.tokenizer import Tokenizer

ROBERTA = Case("xlm-roberta", "XLMRoberta", {"pad_token_id": 1, "type_vocab_size": 1})
SENTENCES = [
    "The old wherry sails to town.",
    "Corn, and COAL!",
    "Ünïcode 2 lines\nof 漢字",
    "[MASK] a[SEP]b",
    "x" * 120,
]


def embed(model: Path, texts: list[str]) -> Any:
    embedder = load_embedder(EngineConfig(model_name="e", model_uri=str(model), dtype="float32", threads=1))
    vectors = embedder.embed([embedder.encode(text)[:60] for text in texts], [None] * len(texts))
    return np.stack([np.frombuffer(vector or b"", np.float32) for vector in vectors])


@pytest.mark.parametrize("kind, number", [("mean_tokens", 1), ("cls_token", 2), ("lasttoken", 3)])
def test_vectors_are_those_of_the_checkpoint(tmp_path: Path, kind: str, number: int) -> None:
    BERT.build(tmp_path / "source")
    save_modules(tmp_path / "source", {f"pooling_mode_{kind}": True})
    file = tmp_path / "m.gguf"
    to_gguf(open_source(tmp_path / "source"), file, None, lambda _: None)
    metadata = GGUFFile.open(file).header.metadata
    assert (metadata["bert.pooling_type"], metadata["tokenizer.ggml.token_type_count"]) == (number, 2)
    wanted = embed(tmp_path / "source", SENTENCES)
    np.testing.assert_array_equal(embed(file, SENTENCES), wanted)
    to_safetensors(open_source(file), tmp_path / "back", None, lambda _: None)
    np.testing.assert_array_equal(embed(tmp_path / "back", SENTENCES), wanted)
    to_gguf(open_source(file), tmp_path / "again.gguf", None, lambda _: None)
    np.testing.assert_array_equal(embed(tmp_path / "again.gguf", SENTENCES), wanted)


def test_xlm_roberta_is_bert_there(tmp_path: Path) -> None:
    """llama.cpp's script leaves out the positions' rows that are nobody's, and calls it BERT."""
    source = tmp_path / "source"
    ROBERTA.build(source)
    ids = [[5, 17, 40, 2, 9], [3]]
    wanted = load_embedder(EngineConfig(model_name="e", model_uri=str(source), dtype="float32", threads=1))
    vectors = wanted.embed(ids, [None, None])
    tensors = load_file(source / "model.safetensors")
    table = "embeddings.position_embeddings.weight"
    tensors[table] = tensors[table][2:].contiguous()
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    config |= {"architectures": ["BertModel"], "max_position_embeddings": config["max_position_embeddings"] - 2}
    (source / "config.json").write_text(json.dumps(config))
    to_gguf(open_source(source), tmp_path / "m.gguf", None, lambda _: None)
    found = load_embedder(EngineConfig(model_name="e", model_uri=str(tmp_path / "m.gguf"), dtype="float32", threads=1))
    assert found.embed(ids, [None, None]) == vectors


def test_pooling_that_gguf_has_no_word_for(tmp_path: Path) -> None:
    BERT.build(tmp_path / "source")
    save_modules(tmp_path / "source", {"pooling_mode_max_tokens": True})
    with pytest.raises(ModelError, match="pooling by max"):
        to_gguf(open_source(tmp_path / "source"), tmp_path / "m.gguf", None, lambda _: None)


@pytest.mark.parametrize("lowercase", [True, False])
@pytest.mark.parametrize("special", [True, False])
def test_wordpiece_through_gguf(tmp_path: Path, lowercase: bool, special: bool) -> None:
    """`special`: tokens in brackets are found in a text, as published tokenizers have it."""
    BERT.build(tmp_path)
    description = json.loads((tmp_path / "tokenizer.json").read_text())
    description["normalizer"]["lowercase"] = lowercase
    theirs = Fast.from_str(json.dumps(description))
    if special:
        theirs.add_special_tokens([AddedToken(word, special=True) for word in WORDS[:5]])
    theirs.save(str(tmp_path / "tokenizer.json"))
    metadata = tokenizer_metadata(tmp_path, {"vocab_size": len(WORDS) + 2})
    assert metadata["tokenizer.ggml.model"] == "bert"
    assert metadata["tokenizer.ggml.bos_token_id"] == metadata["tokenizer.ggml.cls_token_id"] == WORDS.index("[CLS]")
    for carried in (metadata, without_original(metadata)):
        ours = Tokenizer(as_gguf(tmp_path / "t.gguf", carried))
        for text in (*SENTENCES, *TEXTS[:500]):
            assert ours.encode(text) == theirs.encode(text).ids, repr(text)


def test_wordpiece_files_of_early_scripts(tmp_path: Path) -> None:
    """Without kinds of tokens, and with nothing said but the vocabulary; what is in brackets is not marked."""
    BERT.build(tmp_path)
    theirs = Fast.from_file(str(tmp_path / "tokenizer.json"))
    words = {i: word for word, i in theirs.get_vocab().items()}
    plain = [words.get(i, f"[unused{i}]") for i in range(len(WORDS))]
    tokens = [w if w.startswith("[") else w[2:] if w.startswith("##") else "▁" + w for w in plain]
    metadata: dict[str, Value] = {"tokenizer.ggml.model": "bert", "tokenizer.ggml.tokens": tokens}
    ours = Tokenizer(as_gguf(tmp_path / "t.gguf", metadata))
    for text in (*SENTENCES, *TEXTS[:500]):
        assert ours.encode(text) == theirs.encode(text).ids, repr(text)


@pytest.mark.parametrize("change", [{"normalizer": None}, {"pre_tokenizer": {"type": "Whitespace"}}])
def test_wordpiece_that_splits_otherwise_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    BERT.build(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ModelError, match="as BERT's do only"):
        tokenizer_metadata(tmp_path, {"vocab_size": len(WORDS)})


def unigram(directory: Path, **settings: Any) -> dict[str, Value]:
    """What llama.cpp's script writes of a vocabulary like XLM-RoBERTa's."""
    train(directory, model_type="unigram", vocab_size=400, byte_fallback=False, **settings)
    vocabulary = read_model(directory / "tokenizer.model")
    return {
        "tokenizer.ggml.model": "t5",
        "tokenizer.ggml.tokens": [piece.text for piece in vocabulary.pieces],
        "tokenizer.ggml.scores": np.array([piece.score for piece in vocabulary.pieces], np.float32),
        "tokenizer.ggml.token_type": np.array([piece.kind for piece in vocabulary.pieces], np.int32),
        "tokenizer.ggml.precompiled_charsmap": np.frombuffer(vocabulary.charsmap, np.uint8),
        "tokenizer.ggml.add_space_prefix": vocabulary.add_prefix,
        "tokenizer.ggml.remove_extra_whitespaces": vocabulary.squeeze_spaces,
        "tokenizer.ggml.add_bos_token": True,
        "tokenizer.ggml.add_eos_token": True,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
    }


def test_unigram_vocabularies(tmp_path: Path) -> None:
    metadata = unigram(tmp_path, normalization_rule_name="nmt_nfkc", remove_extra_whitespaces=True)
    ours, theirs = Tokenizer(as_gguf(tmp_path / "t.gguf", metadata)), Tokenizer(tmp_path)
    for text in (*SENTENCES, *TEXTS[:500]):
        assert ours.encode(text, special_tokens=False) == theirs.encode(text, special_tokens=False), repr(text)
    assert ours.encode("a")[0] == 1
    assert ours.encode("a")[-1] == 2


BAD: dict[str, tuple[str, Value]] = {
    "no tokens": ("tokens", []),
    "fewer scores": ("scores", np.zeros(3, np.float32)),
    "infinite scores": ("scores", np.full(400, np.inf, np.float32)),
    "nothing unknown": ("token_type", np.ones(400, np.int32)),
    "rules that are none": ("precompiled_charsmap", np.full(40, 255, np.uint8)),
    "no rules": ("precompiled_charsmap", np.zeros(3, np.uint8)),
}


@pytest.mark.parametrize("name", BAD)
def test_unigram_vocabularies_that_are_none(tmp_path: Path, name: str) -> None:
    key, value = BAD[name]
    metadata = {**unigram(tmp_path), f"tokenizer.ggml.{key}": value}
    with pytest.raises(ModelError) as failure:
        Tokenizer(as_gguf(tmp_path / "t.gguf", metadata))
    assert failure.value.code in ("bad_tokenizer", "missing_tokenizer")
