"""Several ranks against one: same logits, same tokens, for every family, format and way of meeting.

Ranks are threads here; `test_parallel_group.py` has processes.
"""

from itertools import pairwise

import msgspec
import pytest
import torch
from tests.runtime.engines import TINY, VOCAB_SIZE
from tests.runtime.random_models import CASES, Case
from tests.runtime.ranks import Checkpoint, group, steps, together

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.models.registry import read_config
from wherry_runtime.parallel.shard import Shard, check


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    case: Case = request.param
    directory = tmp_path_factory.mktemp(case.name)
    case.build(directory)
    return Checkpoint(directory, read_config(directory))


@pytest.mark.parametrize("backend", ["pytorch", "shared", "distributed"])
@pytest.mark.parametrize("size", [2, 4])
def test_logits_are_those_of_one_rank(checkpoint: Checkpoint, backend: str, size: int) -> None:
    one, many = group(checkpoint, 1, backend), group(checkpoint, size, backend)
    for sequences in steps():
        want, got = together(one, sequences), together(many, sequences)
        assert got.shape == want.shape == (sum(s.samples for s in sequences), VOCAB_SIZE)
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
        assert got.argmax(-1).tolist() == want.argmax(-1).tolist()


@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize("size", [2, 4])
def test_quantized_weights(checkpoint: Checkpoint, quantization: str, size: int) -> None:
    """Shares that begin within a group of weights have other scales than the whole, so only about the same numbers."""
    one = group(checkpoint, 1, "shared", quantization=quantization)
    many = group(checkpoint, size, "shared", quantization=quantization)
    for sequences in steps():
        want, got = together(one, sequences), together(many, sequences)
        similarity = torch.nn.functional.cosine_similarity(got, want, dim=-1)
        assert similarity.min() > (0.995 if quantization == "int8" else 0.9)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "fits"),
    [
        (32, 4, 1, True),
        (32, 4, 2, True),
        (32, 4, 4, True),
        (32, 4, 8, True),  # two ranks hold the same head of keys
        (32, 4, 3, False),
        (32, 4, 64, False),  # fewer heads than ranks
        (12, 4, 6, False),  # a rank's queries would need keys of two ranks
        (12, 4, 12, True),
        (14, 2, 7, False),
        (14, 2, 2, True),
        (32, 4, 0, False),
    ],
)
def test_what_can_be_split(heads: int, kv_heads: int, size: int, fits: bool) -> None:
    config = msgspec.structs.replace(read_config(TINY), num_heads=heads, num_kv_heads=kv_heads, vocab_size=32000)
    if fits:
        check(config, size)
        return
    with pytest.raises(ModelError, match=f"over {size} ranks; it can over 1, "):
        check(config, size)


@pytest.mark.parametrize(
    ("total", "unit", "size", "shares"),
    [
        (5632, 128, 2, [2816, 2816]),
        (5632, 128, 4, [1408] * 4),
        (4864, 128, 4, [1152, 1280, 1152, 1280]),
        (160, 128, 2, [80, 80]),
        (32000, 64, 3, [10624, 10688, 10688]),
        (100, 64, 1, [100]),
        (130, 64, 2, [64, 66]),
    ],
)
def test_shares(total: int, unit: int, size: int, shares: list[int]) -> None:
    spans = [shard.span(total, unit) for shard in Shard(0, size).everyone()]
    assert [s.length for s in spans] == shares
    assert spans[0].start == 0
    assert all(a.stop == b.start for a, b in pairwise(spans))
    assert spans[-1].stop == total
