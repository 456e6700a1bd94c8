"""Architectures on the CUDA kernels against PyTorch: what they share with PyTorch, and what kernels do differently."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.runtime.architectures import CUDA, MORE
from tests.runtime.cuda_models import DEVICE
from tests.runtime.random_models import Case

from wherry_runtime.engine.eager_model import EagerModel
from wherry_runtime.engine.runner import ModelRunner
from wherry_runtime.kernels.cuda.model import CudaModel
from wherry_runtime.kvcache.paged import PagedKVCache
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.storage import Storage
from wherry_runtime.scheduling.plan import SequenceStep

CASES = [case for case in MORE if case.name in CUDA]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_logits_are_those_of_pytorch(case: Case, tmp_path: Path) -> None:
    replace(case, settings={"num_hidden_layers": 1, **case.settings}).build(tmp_path)
    config = read_config(tmp_path)
    model = load_model(tmp_path, config, 128, Storage(torch.float32, DEVICE))
    blocks, ids = np.arange(4, dtype=np.int32), list(range(3, 14))

    def logits(make: type[EagerModel] | type[CudaModel]) -> torch.Tensor:
        runner = ModelRunner(make(model, PagedKVCache(config, 8, 4, dtype=torch.float32, device=DEVICE)))
        steps = [(0, 9), (9, 10), (10, 11)]
        return torch.cat([runner.logits([SequenceStep("a", ids[a:b], a, blocks, True)])[0] for a, b in steps])

    torch.testing.assert_close(logits(CudaModel), logits(EagerModel), atol=1e-4, rtol=0)
