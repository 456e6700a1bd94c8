"""The CUDA backend's model against the PyTorch reference: every family, mixed steps, graphs' fixed buffers."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runtime.cuda_models import (
    DEVICE,
    FAMILIES,
    Fed,
    Pair,
    model_config,
    new_cache,
    random_model,
    sequences,
)

from wherry_runtime.engine.eager_model import EagerModel
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.kernels.cuda import model as cuda_model
from wherry_runtime.kernels.cuda.graphs import BUCKETS, buckets_up_to
from wherry_runtime.kernels.cuda.memory import workspace_bytes
from wherry_runtime.kernels.cuda.model import CudaModel
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.layers.linear import Linear
from wherry_runtime.models.decoder import Decoder
from wherry_runtime.quantization.storage import Storage


def pair(tmp_path: Path, stored: str = "float32", dtype: torch.dtype = torch.float32, **settings: object) -> Pair:
    config = model_config(tmp_path, **settings)
    model = random_model(config, Storage(dtype, DEVICE))
    return Pair.of(EagerModel(model, new_cache(config, stored)), CudaModel(model, new_cache(config, stored), 4))


def drive(models: Pair, atol: float) -> None:
    """Prompts in chunks, decodes alone and beside prompts, chunks that draw nothing, and more rows than a graph has."""
    a, b, *rest = sequences([40, 30, 6, 6, 6])
    models.step([a.next(24)], atol=atol)
    models.step([a.next(1), b.next(5, samples=False)], atol=atol)
    models.step([a.next(1), b.next(4)], atol=atol)
    models.step([a.next(1), b.next(1, samples=False), rest[0].next(1)], atol=atol)
    models.step([a.next(1), b.next(1), *(fed.next(1) for fed in rest)], atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
def test_families(tmp_path: Path, family: str) -> None:
    models = pair(tmp_path, **FAMILIES[family])
    drive(models, atol=2e-5)
    for expected, found in zip(models.expected.cache.layers, models.found.cache.layers, strict=True):
        torch.testing.assert_close(found[:-1], expected[:-1], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("stored", "atol"), [("fp8", 0.02), ("int8", 0.01), ("bfloat16", 0.03)])
def test_cache_types(tmp_path: Path, stored: str, atol: float) -> None:
    drive(pair(tmp_path, stored, **FAMILIES["llama-tied"]), atol)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float16, 0.01), (torch.bfloat16, 0.1)])
def test_types_of_half_size(tmp_path: Path, dtype: torch.dtype, atol: float) -> None:
    stored = str(dtype).removeprefix("torch.")
    drive(pair(tmp_path, stored, dtype, **FAMILIES["qwen3"]), atol)


def widened(model: Decoder, config: object) -> Decoder:
    """A model of plain matrices that are what `model` has rounded."""
    plain = random_model(model.config, Storage(torch.float32, DEVICE))
    for rounded, part in zip(model.parts(), plain.parts(), strict=True):
        if isinstance(part, Linear) and isinstance(rounded, Linear) and rounded.packed is not None:
            part.weight = rounded.packed.dequantized()
    return plain


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights(tmp_path: Path, quantization: str) -> None:
    config = model_config(tmp_path, **FAMILIES["llama-biases"], tie_word_embeddings=True)
    model = random_model(config, Storage(torch.float32, DEVICE, quantization))  # type: ignore[arg-type]
    reference = EagerModel(widened(model, config), new_cache(config, "float32"))
    drive(Pair.of(reference, CudaModel(model, new_cache(config, "float32"), 4)), atol=2e-5)


def test_a_row_does_not_depend_on_the_rows_that_fill_a_bucket_up(tmp_path: Path) -> None:
    """Steps of 1 and 3 rows go through buckets of 1 and 4; none may write or read what it should not."""
    config = model_config(tmp_path, **FAMILIES["qwen2-two-windows"])
    model = random_model(config, Storage(torch.float32, DEVICE))
    cache = new_cache(config, "float32")
    runner = ModelRunner(CudaModel(model, cache, 4))
    fed = sequences([20, 12, 16])
    for one in fed:
        runner.logits([one.next(len(one.tokens) - 3)])
    before = [layer.clone() for layer in cache.layers]
    logits, ids = runner.logits([one.next(1) for one in fed])
    together = dict(zip(ids, logits.clone(), strict=True))
    changed = {int(b) for one in fed for b in one.blocks}
    for layer, was in zip(cache.layers, before, strict=True):
        for block in set(range(cache.num_blocks + 1)) - changed:
            assert torch.equal(layer[block], was[block])
    for one in fed:
        one.done -= 1
        alone, _ = runner.logits([one.next(1)])
        torch.testing.assert_close(alone[0], together[one.name], atol=1e-5, rtol=0)


def test_guesses_are_rows_of_their_own(tmp_path: Path) -> None:
    models = pair(tmp_path, **FAMILIES["mistral-window"])
    (a,) = sequences([40])
    models.step([a.next(25)], atol=2e-5)
    steps = [a.next(1) for _ in range(4)]
    models.step(steps, atol=2e-5)


def test_more_parts_than_a_graph_has_room_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long context for every row is computed without the graph."""
    monkeypatch.setattr(cuda_model, "MOST_PARTIAL_BYTES", 0)
    monkeypatch.setattr(cuda_model, "PART", 4)
    monkeypatch.setattr("wherry_runtime.kernels.cuda.step.PART", 4)
    monkeypatch.setattr("wherry_runtime.kernels.cuda.attention_decode.PART", 4)
    models = pair(tmp_path, **FAMILIES["llama-tied"])
    a, b = sequences([40, 30])
    models.step([a.next(30), b.next(25)], atol=2e-5)
    models.step([a.next(1), b.next(1)], atol=2e-5)


def test_many_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts than are summed up at once, and windows that begin inside one."""
    monkeypatch.setattr("wherry_runtime.kernels.cuda.step.PART", 2)
    monkeypatch.setattr("wherry_runtime.kernels.cuda.attention_decode.PART", 2)
    models = pair(tmp_path, **FAMILIES["qwen2-two-windows"])
    a, b = sequences([60, 30])
    models.step([a.next(57), b.next(9)], atol=2e-5)
    models.step([a.next(1), b.next(1)], atol=2e-5)


@pytest.mark.parametrize(
    ("rows", "largest", "count"), [(1, 1, 1), (2, 2, 2), (3, 4, 3), (64, 64, 9), (65, 96, 10), (10_000, 256, 13)]
)
def test_buckets(rows: int, largest: int, count: int) -> None:
    assert buckets_up_to(rows) == BUCKETS[:count]
    assert BUCKETS[count - 1] == largest


def test_workspace(tmp_path: Path) -> None:
    config = model_config(tmp_path, **FAMILIES["llama-tied"])
    model = random_model(config, Storage(torch.float32, DEVICE))
    taken = workspace_bytes(model, 4, FORMATS["float32"], 9)
    assert taken >= 0
    if DEVICE.type == "cuda":
        assert taken > 9 * config.intermediate_size * 4


def test_numbers_that_are_not_finite_stay_with_their_sequence(tmp_path: Path) -> None:
    """A block that held NaN is read by nobody beyond his own tokens, even where it is masked."""
    config = model_config(tmp_path, **FAMILIES["llama-tied"])
    model = random_model(config, Storage(torch.float32, DEVICE))
    cache = new_cache(config, "float32")
    for layer in cache.layers:
        layer.fill_(float("nan"))
    runner = ModelRunner(CudaModel(model, cache, 4))
    a = Fed("a", list(range(20)), np.arange(5, dtype=np.int32))
    for count in (6, 1, 3):
        logits, _ = runner.logits([a.next(count)])
        assert bool(logits.isfinite().all())
