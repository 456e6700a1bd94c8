"""Embedding models against transformers, float32, on random models: rows, pooling, batches of unequal texts."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.runtime.encoders import BERT, CASES, VOCAB_SIZE, Case, save_modules
from torch.nn import functional
from transformers import BertTokenizerFast

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.embedding.model import Embedder, load_embedder
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.models.registry import FAMILIES, read_config

LENGTHS = (3, 17, 3, 1, 62, 30, 3, 17)


@dataclass
class Reference:
    case: Case
    directory: Path
    texts: list[list[int]]
    rows: list[torch.Tensor]  # of each text, [length, hidden_size], by transformers


def texts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(5)
    # No padding token among them: what RoBERTa makes of its position is no text's business.
    return [torch.randint(2, VOCAB_SIZE, (length,), generator=generator).tolist() for length in LENGTHS]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def reference(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Reference:
    directory = tmp_path_factory.mktemp(request.param.name)
    model = request.param.build(directory)
    with torch.inference_mode():
        rows = [model(torch.tensor([text])).last_hidden_state[0] for text in texts()]
    return Reference(request.param, directory, texts(), rows)


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("bert")
    BERT.build(directory)
    return directory


def loaded(directory: Path, **settings: Any) -> Embedder:
    given: dict[str, Any] = {"dtype": "float32", "threads": 1, **settings}
    return load_embedder(EngineConfig(model_name="e", model_uri=str(directory), **given))


def vectors(embedder: Embedder, batch: list[list[int]], dimensions: int | None = None) -> npt.NDArray[np.float32]:
    told = embedder.embed(batch, [dimensions] * len(batch))
    return np.stack([np.frombuffer(one or b"", dtype="<f4") for one in told])


def copy(source: Path, target: Path) -> Path:
    for file in source.iterdir():
        if file.is_file():
            (target / file.name).write_bytes(file.read_bytes())
    return target


POOLINGS: dict[str, tuple[dict[str, Any], Callable[[torch.Tensor], torch.Tensor]]] = {
    "mean": ({"pooling_mode_mean_tokens": True}, lambda rows: rows.mean(0)),
    "cls": ({"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}, lambda rows: rows[0]),
    "max": ({"pooling_mode_max_tokens": True}, lambda rows: rows.amax(0)),
    "last": ({"pooling_mode_lasttoken": True}, lambda rows: rows[-1]),
    "in-one-word": ({"pooling_mode": "lasttoken"}, lambda rows: rows[-1]),
}


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("normalize", [True, False])
def test_vectors_are_those_of_transformers(reference: Reference, pooling: str, normalize: bool, tmp_path: Path) -> None:
    flags, pool = POOLINGS[pooling]
    directory = copy(reference.directory, tmp_path)
    save_modules(directory, flags, normalize=normalize)
    expected = torch.stack([pool(rows) for rows in reference.rows])
    if normalize:
        expected = functional.normalize(expected, dim=-1)
    found = torch.from_numpy(vectors(loaded(directory), reference.texts))
    assert float(expected.std()) > 0.1  # else the tolerance would say nothing
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_without_their_files_the_normalized_mean(reference: Reference) -> None:
    expected = functional.normalize(torch.stack([rows.mean(0) for rows in reference.rows]), dim=-1)
    found = torch.from_numpy(vectors(loaded(reference.directory), reference.texts))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_text_does_not_depend_on_what_is_beside_it(reference: Reference) -> None:
    embedder = loaded(reference.directory)
    together = vectors(embedder, reference.texts)
    alone = np.concatenate([vectors(embedder, [text]) for text in reference.texts])
    np.testing.assert_allclose(together, alone, atol=1e-6)
    backwards = vectors(embedder, reference.texts[::-1])[::-1]
    np.testing.assert_allclose(together, backwards, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "least"),
    [({"dtype": "bfloat16"}, 0.999), ({"quantization": "int8"}, 0.999), ({"quantization": "int4"}, 0.93)],
    ids=lambda value: "-".join(value.values()) if isinstance(value, dict) else "",
)
def test_rounded_weights(reference: Reference, settings: dict[str, Any], least: float, tmp_path: Path) -> None:
    expected = torch.from_numpy(vectors(loaded(reference.directory), reference.texts))
    given = {"weight_cache": str(tmp_path), **settings}
    for _ in range(2):  # the second time from the cache of packed weights
        found = torch.from_numpy(vectors(loaded(reference.directory, **given), reference.texts))
        similar = functional.cosine_similarity(found, expected)
        assert least < float(similar.min()) < 1 - 1e-7
    assert bool(list(tmp_path.iterdir())) == ("quantization" in settings)


def test_every_encoder_is_in_the_table() -> None:
    known = {name for name, family in FAMILIES.items() if family.encoder}
    assert {case.model or f"{case.family}Model" for case in CASES} <= known <= set(FAMILIES)
    assert {FAMILIES[name].architecture for name in known} <= {f"{case.family}Model" for case in CASES}


def test_names_of_checkpoints(bert: Path, tmp_path: Path) -> None:
    """With and without the prefix, norms as TensorFlow calls them, buffers and the pooler of old ones."""
    expected = vectors(loaded(bert), texts())
    tensors = load_file(bert / "model.safetensors")
    assert any(name.startswith("pooler.") for name in tensors)
    renamed = {
        "bert." + name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
        for name, t in tensors.items()
    }
    extra = {"bert.embeddings.position_ids": torch.arange(64)[None], "cls.predictions.bias": torch.zeros(VOCAB_SIZE)}
    copy(bert, tmp_path)
    save_file(renamed | extra, tmp_path / "model.safetensors")
    np.testing.assert_array_equal(vectors(loaded(tmp_path), texts()), expected)
    del renamed["bert.encoder.layer.1.attention.self.key.bias"]
    save_file(renamed, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"lacks bert\.encoder\.layer\.1\.attention\.self\.key\.bias"):
        loaded(tmp_path)
    save_file(renamed | {"bert.encoder.layer.9.x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError):
        loaded(tmp_path)


TEXTS = ["The old wherry sails to town.", "Coal, corn and... boats? zz9", "", "ÉCLAIR!!", "a" * 300, "river " * 100]


def test_token_ids_are_those_of_transformers(bert: Path) -> None:
    embedder = loaded(bert)
    theirs = BertTokenizerFast(tokenizer_file=str(bert / "tokenizer.json"))
    for text in TEXTS:
        assert embedder.encode(text) == theirs(text)["input_ids"]
        for length in (2, 3, 7, 64):
            cut = theirs(text, truncation=True, max_length=length)["input_ids"]
            assert embedder.encode(text, length) == cut
    assert embedder.encode("boat", 1) == theirs("")["input_ids"][:1]


def test_how_long_texts_may_be(bert: Path, tmp_path: Path) -> None:
    copy(bert, tmp_path)
    assert loaded(tmp_path).max_length == 64
    save_modules(tmp_path, max_seq_length=40, do_lower_case=True)
    assert loaded(tmp_path).max_length == 40
    assert loaded(tmp_path, max_model_len=60).max_length == 60
    with pytest.raises(ModelError, match="max_model_len 65 is more than the model's context, 64"):
        loaded(tmp_path, max_model_len=65)
    assert loaded(tmp_path).encode("BOAT") == loaded(tmp_path).encode("boat")


def test_vectors_that_may_be_cut(bert: Path, tmp_path: Path) -> None:
    copy(bert, tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())

    def allowed(**said: Any) -> list[int]:
        (tmp_path / "config.json").write_text(json.dumps({**raw, **said}))
        embedder = loaded(tmp_path)
        return [size for size in (1, 8, 16, 31, 32, 33) if embedder.pooling.allows(size, embedder.width)]

    assert allowed() == [32]
    assert allowed(is_matryoshka=True) == [1, 8, 16, 31, 32]
    assert allowed(matryoshka_dimensions=[8, 16, 64]) == [8, 16, 32]
    whole, cut = (vectors(loaded(tmp_path), texts(), size) for size in (None, 8))
    expected = whole[:, :8] / np.linalg.norm(whole[:, :8], axis=1, keepdims=True)
    np.testing.assert_allclose(cut, expected, atol=1e-6)


def edit(directory: Path, name: str, **change: Any) -> None:
    path = directory / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))


REFUSED: dict[str, tuple[Callable[[Path], object], dict[str, Any], str]] = {
    "relative positions": (
        lambda d: edit(d, "config.json", position_embedding_type="relative_key"),
        {},
        "position_embedding_type 'relative_key' is not supported",
    ),
    "a decoder": (lambda d: edit(d, "config.json", is_decoder=True), {}, "is_decoder is not supported"),
    "two poolings": (
        lambda d: edit(d, "1_Pooling/config.json", pooling_mode_cls_token=True),
        {},
        "pooling_mode_mean_tokens and pooling_mode_cls_token is not supported; one of",
    ),
    "another pooling": (
        lambda d: save_modules(d, {"pooling_mode_weightedmean_tokens": True}),
        {},
        "pooling_mode_weightedmean_tokens is not supported",
    ),
    "without the prompt": (
        lambda d: edit(d, "1_Pooling/config.json", include_prompt=False),
        {},
        "include_prompt = false is not supported",
    ),
    "another module": (
        lambda d: (d / "modules.json").write_text(
            '[{"path": "2_Dense", "type": "sentence_transformers.models.Dense"}]'
        ),
        {},
        "the module Dense is not supported; Transformer, Pooling, Normalize are",
    ),
    "a module elsewhere": (
        lambda d: (d / "modules.json").write_text('[{"path": "../x", "type": "a.Pooling"}]'),
        {},
        "outside of the model's directory",
    ),
    "no modules": (lambda d: (d / "modules.json").write_text("{}"), {}, "not a list of modules"),
    "odd sizes": (
        lambda d: edit(d, "config.json", matryoshka_dimensions=["8"]),
        {},
        "is no list of lengths",
    ),
    "ranks": (lambda d: None, {"tensor_parallel": 2}, "cannot be split over 2 ranks: .* add replicas instead"),
    "native": (lambda d: None, {"backend": "native"}, "leave out --backend native"),
    "guesses": (lambda d: None, {"speculative": "ngram"}, "no tokens to guess; leave out --speculative"),
    "a cache": (lambda d: None, {"kv_cache_bytes": 1 << 20}, "no KV cache; leave out --kv-cache-bytes"),
    "a cache's type": (lambda d: None, {"kv_cache_dtype": "fp8"}, "no KV cache; leave out --kv-cache-dtype"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name: str, bert: Path, tmp_path: Path) -> None:
    change, settings, message = REFUSED[name]
    copy(bert, tmp_path)
    save_modules(tmp_path)
    change(tmp_path)
    with pytest.raises(ModelError, match=message):
        loaded(tmp_path, **settings)


def test_nothing_that_generates_takes_an_encoder(bert: Path) -> None:
    from wherry_runtime.engine.part import Outline
    from wherry_runtime.parallel.group import place

    config = EngineConfig(model_name="e", model_uri=str(bert))
    assert msgspec.structs.asdict(read_config(bert))["encoder"] is not None
    with pytest.raises(ModelError, match="turns texts into vectors and generates nothing"):
        Outline.of(config, place(config)).load()
