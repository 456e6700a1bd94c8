"""When the CUDA backend is chosen, that nothing needs Triton without it, and the whole engine on it."""

import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from tests.runtime.cuda_models import DEVICE, FAMILIES, model_config, random_model
from tests.runtime.engines import VOCAB_SIZE, ask_all, running, save_byte_tokenizer

from wherry_protocol.engine_config import Backend
from wherry_runtime.engine import backend, part
from wherry_runtime.engine.failures import is_out_of_memory
from wherry_runtime.kernels.cuda import support
from wherry_runtime.kernels.cuda.model import CudaModel
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quantization.storage import Storage

CUDA = torch.device("cuda")


@pytest.mark.parametrize(
    ("wanted", "device", "reason", "chosen"),
    [
        ("auto", "cuda", None, True),
        ("native", "cuda", None, True),
        ("pytorch", "cuda", None, False),
        ("auto", "cuda", "no Triton", False),
        ("auto", "cpu", None, False),
        ("native", "cpu", None, False),
    ],
)
def test_choice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: Backend, device: str, reason: str | None, chosen: bool
) -> None:
    monkeypatch.setattr(support, "unavailable", lambda device: reason)
    config = model_config(tmp_path, **FAMILIES["qwen3"])
    stored, place = FORMATS["bfloat16"], torch.device(device)
    assert backend.use_cuda(wanted, config, stored, place) is chosen
    if device == "cuda":
        assert not backend.use_native(wanted, config, torch.bfloat16, stored, 16, place)


def test_what_was_asked_for_and_cannot_be_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "unavailable", lambda device: None)
    odd = model_config(tmp_path, architectures=["LlamaForCausalLM"], head_dim=20)
    with pytest.raises(ModelError, match="heads of 20 columns"):
        backend.use_cuda("native", odd, FORMATS["bfloat16"], CUDA)
    monkeypatch.setattr(support, "unavailable", lambda device: "no Triton")
    with pytest.raises(ModelError, match="no Triton"):
        backend.use_cuda("native", odd, FORMATS["bfloat16"], CUDA)


def test_reasons(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "interpreted", lambda: False)
    assert support.unavailable(torch.device("cpu")) == "the device is cpu"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old")
    assert support.unavailable(CUDA) == "Old has compute capability 7.5; 8.0 is needed"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setenv("CC", "cc")
    assert support.unavailable(CUDA) is None
    monkeypatch.delenv("CC")
    monkeypatch.setenv("PATH", "/nowhere")
    assert "install gcc or clang" in str(support.unavailable(CUDA))
    monkeypatch.setattr(support.importlib.util, "find_spec", lambda name: None)
    assert "pip install torch triton" in str(support.unavailable(CUDA))


def test_nothing_needs_triton_before_it_is_chosen() -> None:
    """As where PyTorch's build for CPUs is installed."""
    program = """
import sys
sys.modules["triton"] = None
import wherry_runtime.__main__, wherry_runtime.engine.setup, wherry_runtime.engine.async_engine, wherry_cli.serve
assert "wherry_runtime.kernels.cuda.support" in sys.modules
assert "wherry_runtime.kernels.cuda.model" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), True),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), True),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), False),
        (MemoryError(), True),
    ],
)
def test_out_of_memory_is_recognized(error: Exception, expected: bool) -> None:
    assert is_out_of_memory(error) is expected


def test_quantized_weights_on_pytorch_are_warned_about(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    config = model_config(tmp_path, **FAMILIES["llama-tied"])
    model = random_model(config, Storage(torch.float32, torch.device("cpu"), "int8"))
    with caplog.at_level(logging.WARNING):
        backend.build(model, 2, 4, FORMATS["float32"], native=False, threads=1)
    assert "slow on PyTorch" in caplog.text


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A small model on disk."""
    config = model_config(tmp_path, **FAMILIES["qwen2-two-windows"])
    model = random_model(config, Storage(torch.float32, torch.device("cpu")))
    generator = torch.Generator().manual_seed(1)
    tensors = {name: 0.3 * torch.randn(slot.shape, generator=generator) for name, slot in model.slots().items()}
    safetensors.torch.save_file(tensors, tmp_path / "model.safetensors")
    save_byte_tokenizer(tmp_path)
    return tmp_path


async def test_the_engine_answers_as_on_pytorch(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts in chunks beside decodes, graphs' buckets, greedy and seeded answers with and without filters."""
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (3, 21, 9)]
    ways: list[dict[str, Any]] = [
        {"temperature": 0},
        {"temperature": 0.9, "seed": 11},
        {"temperature": 0.9, "seed": 12, "top_k": 30, "top_p": 0.95, "repetition_penalty": 1.1},
    ]
    settings = {"max_batched_tokens": 12, "max_running": 4, "prefix_cache": False, "kv_tokens": 200}

    async def answers(**more: Any) -> list[list[int]]:
        async with running(checkpoint, **settings, **more) as engine:
            return [a.ids for way in ways for a in await ask_all(engine, prompts, max_tokens=4, **way)]

    expected = await answers(backend="pytorch")
    built: list[object] = []

    class Watched(CudaModel):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            built.append(self)

    monkeypatch.setattr("wherry_runtime.kernels.cuda.model.CudaModel", Watched)
    monkeypatch.setattr(part, "use_cuda", lambda *args: True)
    if DEVICE.type == "cpu":
        monkeypatch.setattr(part, "use_native", lambda *args: False)
    assert await answers() == expected
    assert built
