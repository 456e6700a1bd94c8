"""The benchmark's other side computes the same model, and without a GPU it says what it needs."""

import msgspec
import pytest
import torch
from benchmarks import cuda_engine
from tests.runtime.cuda_models import DEVICE


@pytest.mark.skipif(DEVICE.type == "cuda", reason="bfloat16 there, in which two likeliest tokens may change places")
def test_the_static_loop_computes_the_same_model() -> None:
    config = msgspec.structs.replace(
        cuda_engine.SHAPE_1_1B, vocab_size=64, hidden_size=32, intermediate_size=48, num_layers=2, num_heads=4
    )
    config = msgspec.structs.replace(config, num_kv_heads=2, head_dim=16)
    model = cuda_engine.random_model(config, DEVICE)
    ours = cuda_engine.Ours(model, 64)
    loop = cuda_engine.Compiled(model, 64, lambda function: function)
    assert ours.prefill(20) == loop.prefill(20)
    tokens = [1, 2, 3]
    for position in range(20, 24):
        found = [engine.decode(tokens, position)[:1] for engine in (ours, loop)]
        assert found[0] == found[1]
    matrices = sum(part.weight.numel() for part in model.parts() if getattr(part, "num_outputs", 0))  # type: ignore[union-attr]
    assert cuda_engine.step_bytes(model, 2, 10) == 4 * (matrices + 2 * 10 * 2 * 2 * 2 * 16)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it would be measured")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["cuda_engine"])
    assert cuda_engine.main() == 0
    assert "needs an NVIDIA GPU" in capsys.readouterr().out
