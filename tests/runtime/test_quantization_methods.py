"""Methods of quantizing: never worse than rounding to nearest, the same bytes after kill -9, and what is refused."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from tests.runtime.engines import CHECKOUT, TINY
from tests.runtime.random_models import Case

from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.calibration import auto
from wherry_runtime.calibration.auto import Candidate, Loss, candidates, choose, first_within
from wherry_runtime.calibration.folds import folds
from wherry_runtime.calibration.pipeline import Job, quantize
from wherry_runtime.calibration.walk import Walk
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quality.measure import Subject, compare
from wherry_runtime.quantization.recipes import known
from wherry_runtime.quantization.recipes.base import Recipe, Settings
from wherry_runtime.quantization.recipes.prune import RECIPE as PRUNE
from wherry_runtime.quantization.rounding import Grid
from wherry_runtime.quantization.solvers import awq, gptq
from wherry_runtime.quantization.solvers.inputs import Inputs
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

TEXT = CHECKOUT / "benchmarks" / "data" / "dev.txt"
CALIBRATION = CHECKOUT / "benchmarks" / "data" / "calibration.txt"
RECIPES = known()


def problem(seed: int, outputs: int, inputs: int, rows: int) -> tuple[torch.Tensor, Inputs]:
    """Weights, and inputs that go together and differ in size, one of them dead."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(outputs, inputs, generator=generator)
    mixed = torch.randn(rows, inputs, generator=generator) @ torch.randn(inputs, inputs, generator=generator)
    x = mixed * torch.exp(torch.randn(inputs, generator=generator))
    x[:, seed % inputs] = 0
    found = Inputs.empty(inputs)
    found.add(x)
    return weights, found


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    inputs=st.sampled_from([32, 40, 96, 160]),
    rows=st.sampled_from([1, 7, 300]),
    bits=st.sampled_from([2, 3, 4, 8]),
    symmetric=st.booleans(),
    act_order=st.booleans(),
)
def test_gptq_is_never_worse_than_rounding_to_nearest(
    seed: int, inputs: int, rows: int, bits: int, symmetric: bool, act_order: bool
) -> None:
    weights, found = problem(seed, 12, inputs, rows)
    grid = Grid(bits, 32, symmetric)
    solved = gptq.solve(weights, found, grid, act_order=act_order, damping=0.01)
    error, nearest = (found.error(weights - m.dequantized()) for m in (solved, grid.nearest(weights)))
    # The same sums in another order differ in the last digits.
    assert (error <= nearest * (1 + 1e-4) + 1e-5 * found.error(weights)).all()


@pytest.mark.parametrize("bits, share", [(4, 0.35), (3, 0.35)])
def test_what_gptq_and_awq_take_off_the_error(bits: int, share: float) -> None:
    weights, found = problem(1, 64, 128, 1000)
    grid = Grid(bits, 32, symmetric=True)
    nearest = found.error(weights - grid.nearest(weights).dequantized()).sum()
    solved = gptq.solve(weights, found, grid, act_order=True, damping=0.01)
    assert found.error(weights - solved.dequantized()).sum() < share * nearest
    scales = awq.find_scales(weights, found, grid)
    scaled = awq.clipped(weights * scales, found.divided(scales), grid).dequantized() / scales
    assert found.error(weights - scaled).sum() < 0.75 * nearest


def test_a_grid_of_zeros_and_a_grid_of_one_value() -> None:
    for symmetric in (True, False):
        grid = Grid(4, 32, symmetric)
        assert not grid.nearest(torch.zeros(3, 64)).dequantized().any()
        same = torch.full((3, 64), 0.25)
        assert torch.allclose(grid.nearest(same, search=True).dequantized(), same, rtol=2**-10)  # of a float16 scale


def test_scales_are_tied_where_inputs_are_made_by_one_row() -> None:
    found = awq.normalized(torch.tensor([1.0, 4.0, 9.0, 9.0]), torch.tensor([7, 7, 5, 5]))
    assert found[0] == found[1]
    assert found[2] / found[0] == pytest.approx(4.5)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers with biases, and heads of queries that share those of values."""
    directory = tmp_path_factory.mktemp("small")
    changes = {"num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": False}
    Case("small", "Llama", {**changes, "dtype": "float32"}).build(directory)
    return directory


def some_windows(directory: Path, count: int = 4, length: int = 48) -> list[list[int]]:
    return windows(CALIBRATION, Tokenizer(directory), count, length)


@pytest.mark.parametrize("family", ["Llama", "Qwen2", "Qwen3", "Mistral"])
def test_folding_scales_changes_no_result(family: str, tmp_path: Path) -> None:
    Case("folds", family, {"num_hidden_layers": 1}).build(tmp_path)
    walk = Walk(tmp_path, 32)
    layer = walk.layer(0)
    x = walk.start(list(range(32)))
    with torch.inference_mode():
        before = walk.run(layer, x, lambda linear, x: None)
        found = folds(layer)
        assert [len(next(iter(f.linear.rows)).split(".")) for f in found] == [5] * 4
        for number, fold in enumerate(found):
            scales = torch.exp(torch.randn(fold.linear.num_inputs, generator=torch.Generator().manual_seed(number)))
            fold.apply(awq.normalized(scales, fold.rows))
        after = walk.run(layer, x, lambda linear, x: None)
    assert before is not None
    assert after is not None
    assert torch.allclose(before, after, atol=1e-5)


def job(source: Path, target: Path, recipe: Recipe, **chosen: Any) -> Job:
    calibration = some_windows(source) if recipe.calibrates else []
    return Job(source, target, recipe, recipe.settled(Settings(**chosen)), calibration)


def divergence(directory: Path, reference: Path, chosen: list[list[int]], **settings: Any) -> float:
    """Mean, in nats per token, through the engine."""
    subjects = [
        Subject(EngineConfig(model_name="m", model_uri=str(d), dtype="float32", threads=1, **settings), len(chosen[0]))
        for d in (directory, reference)
    ]
    return compare(subjects[0].scorer, subjects[1].scorer, chosen, lambda: None).summary().divergence


# Of a model with random weights, and so with the least that a method can do.
LARGEST = {"int8": 2e-4, "smoothquant": 3e-4, "fp8": 2e-3, "prune24": 3.0, "ternary": 3.0}


@pytest.mark.parametrize("name", sorted(RECIPES))
@pytest.mark.parametrize("backend", ["native", "pytorch"])
def test_every_method_writes_what_the_engine_loads(name: str, backend: str, small: Path, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    reports: list[tuple[int, int]] = []
    group = {"group": 32} if recipe.groups else {}
    quantize(job(small, tmp_path / "out", recipe, **group), lambda done, total: reports.append((done, total)))
    assert reports == [(0, 3), (1, 3), (2, 3), (3, 3)]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out"]
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (small / "tokenizer.json").read_bytes()
    assert divergence(tmp_path / "out", small, some_windows(small, 2), backend=backend) < LARGEST.get(name, 0.1)


def test_pruning_leaves_two_of_every_four() -> None:
    weights, found = problem(3, 8, 64, 100)
    pruned = PRUNE.round(weights, found, Settings()).dequantized()
    kept = (pruned != 0).view(8, 16, 4).sum(dim=-1)
    assert (kept == 2).all()
    assert torch.equal(pruned[pruned != 0], weights[pruned != 0])


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.9])
def test_magnitude_pruning_keeps_the_largest_anywhere(sparsity: float) -> None:
    weights, found = problem(4, 8, 60, 1)
    recipe = RECIPES["prune"]
    pruned = recipe.round(weights, found, recipe.settled(Settings(sparsity=sparsity))).dequantized()
    kept = pruned != 0
    assert int(kept.sum()) == weights.numel() - round(sparsity * weights.numel())
    assert torch.equal(pruned[kept], weights[kept])
    assert weights[kept].abs().min() >= weights[~kept].abs().max()


KILLED = """
import sys, time
from pathlib import Path
from tests.runtime.test_quantization_methods import RECIPES, job
from wherry_runtime.calibration.pipeline import quantize

def report(done, total):
    print(done, flush=True)
    while done == 1:
        time.sleep(60)

quantize(job(Path(sys.argv[1]), Path(sys.argv[2]), RECIPES[sys.argv[3]], group=32), report)
"""


@pytest.mark.parametrize("name", ["gptq", "awq"])
def test_a_killed_run_goes_on_to_the_same_bytes(name: str, small: Path, tmp_path: Path) -> None:
    recipe = RECIPES[name]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    quantize(job(small, whole, recipe, group=32), lambda done, total: None)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(CHECKOUT), *sys.path])}
    command = [sys.executable, "-c", KILLED, str(small), str(cut), name]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) as process:
        assert process.stdout is not None
        assert [process.stdout.readline().strip() for _ in range(2)] == ["0", "1"]
        process.send_signal(signal.SIGKILL)
    assert not cut.exists()
    reports: list[int] = []
    quantize(job(small, cut, recipe, group=32), lambda done, total: reports.append(done))
    assert reports[0] == 1
    assert {p.name: p.read_bytes() for p in cut.iterdir()} == {p.name: p.read_bytes() for p in whole.iterdir()}


def test_what_another_job_left_is_not_gone_on_with(small: Path, tmp_path: Path) -> None:
    left = tmp_path / "out.partial"
    left.mkdir()
    (left / "progress.json").write_text(json.dumps({"digest": "another", "layers": 2}))
    (left / "rubbish.bin").write_bytes(b"x")
    quantize(job(small, tmp_path / "out", RECIPES["int4"]), lambda done, total: None)
    assert "rubbish.bin" not in {p.name for p in (tmp_path / "out").iterdir()}


def test_what_is_there_is_not_written_over(small: Path, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="is there already"):
        quantize(job(small, tmp_path, RECIPES["int4"]), lambda done, total: None)


def test_a_quantized_checkpoint_is_no_source(small: Path, tmp_path: Path) -> None:
    quantize(job(small, tmp_path / "one", RECIPES["int8"]), lambda done, total: None)
    with pytest.raises(ModelError, match="quantized already"):
        quantize(job(tmp_path / "one", tmp_path / "two", RECIPES["int4"]), lambda done, total: None)


@pytest.mark.parametrize(
    "name, chosen, message",
    [
        ("gptq", {"bits": 5}, "gptq has no bits 5; it has 4, 3, 2, 8"),
        ("awq", {"group": 16}, "awq has no group 16; it has 128, 32, 64"),
        ("int8", {"bits": 8}, "int8 has no bits 8; it has no choice of it"),
        ("int4", {"symmetric": False}, "int4 has no zero points"),
        ("gptq", {"damping": 0.0}, "damping lies between 0 and 1"),
        ("smoothquant", {"smoothing": 1.5}, "smoothing in 0 to 1"),
    ],
)
def test_settings_that_a_method_does_not_have(name: str, chosen: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RECIPES[name].settled(Settings(**chosen))


def test_too_little_text_is_an_error_that_counts(tmp_path: Path, small: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("too little " * 10)
    with pytest.raises(ModelError, match=r"110 tokens are 2 windows of 48, and 4 are asked for") as caught:
        windows(short, Tokenizer(small), 4, 48)
    assert caught.value.code == "too_little_text"
    short.write_bytes(b"\xff\xfe")
    with pytest.raises(ModelError, match="not a text in UTF-8"):
        windows(short, Tokenizer(small), 1, 16)


def test_windows_are_of_one_length_and_differ() -> None:
    found = windows(TEXT, Tokenizer(TINY), 3, 64)
    assert [len(w) for w in found] == [64] * 3
    assert found[0] != found[1]


def only(*names: str) -> list[Candidate]:
    return [candidate for candidate in candidates() if str(candidate) in names]


@pytest.mark.parametrize("limit, found", [(1.0, ["gptq mixed, 2.75 bits"]), (2e-4, ["int8", "smoothquant"])])
def test_auto_takes_the_smallest_that_is_good_enough(
    limit: float, found: list[str], small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "candidates", lambda: only("gptq mixed, 2.75 bits", "int8", "smoothquant"))
    tried: list[str] = []

    def trying(candidate: Candidate) -> Any:
        tried.append(str(candidate))
        return lambda done, total: None

    chosen, loss = choose(small, tmp_path / "out", limit, some_windows(small), trying)
    assert str(chosen) in found
    assert tried == ["gptq mixed, 2.75 bits", *(found if len(found) > 1 else [])]
    assert loss.mean + loss.error <= limit
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert divergence(tmp_path / "out", small, some_windows(small)[:1]) == pytest.approx(loss.mean, rel=0.2)


@pytest.mark.parametrize(
    "limit, place", [(1.0, 0), (0.1, 1), (0.0999, 2), (0.011, 2), (0.0105, 3), (1e-9, None)], ids=str
)
def test_auto_takes_the_first_that_is_within_the_limit_with_its_error(limit: float, place: int | None) -> None:
    """Losses of the candidates, the smallest first; the second's error is what puts it over the limit."""
    losses = dict(zip(map(str, candidates()), [Loss(0.2, 0.0), Loss(0.09, 0.01), Loss(0.01, 0.001)], strict=False))
    asked: list[str] = []

    def loss(candidate: Candidate) -> Loss:
        asked.append(str(candidate))
        return losses.get(str(candidate), Loss(1e-6, 0.0))

    if place is None:
        with pytest.raises(ModelError, match=r"within 1e-09: .*: 0\.2000 ± 0\.0000; .*: 0\.0900 ± 0\.0100"):
            first_within(limit, loss)
    else:
        assert str(first_within(limit, loss)[0]) == str(candidates()[place])
        assert asked == [str(candidate) for candidate in candidates()[: place + 1]]


@pytest.mark.parametrize("better", ["int8", "smoothquant"])
def test_auto_takes_the_better_one_of_equally_large_ones(better: str) -> None:
    def loss(candidate: Candidate) -> Loss:
        return Loss({"int8": 3e-5, "smoothquant": 3e-5, better: 2e-5}.get(str(candidate), 1.0), 0.0)

    assert str(first_within(1e-4, loss)[0]) == better


def test_a_loss_by_hand() -> None:
    assert Loss.of([0.1, 0.3]) == Loss(pytest.approx(0.2), pytest.approx(0.1))
    assert Loss.of([0.1]) == Loss(0.1, 0.0)


def test_a_method_that_has_not_so_few_bits_is_no_candidate(small: Path, tmp_path: Path) -> None:
    def loss(candidate: Candidate) -> Loss:
        if candidate.settings.bits_per_weight:
            raise ModelError("too_few_bits", "")
        return Loss(0.0, 0.0)

    assert str(first_within(1.0, loss)[0]) == "awq-gptq 4 bits, groups of 128"


def test_auto_leaves_nothing_where_nothing_is_good_enough(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto, "candidates", lambda: only("int8"))
    with pytest.raises(ModelError, match=r"within 0: int8: 0\.00\d+ ± 0"):
        choose(small, tmp_path / "out", 0, some_windows(small), lambda candidate: lambda done, total: None)
    assert not list(tmp_path.iterdir())


def test_quality_of_the_sample_model(tmp_path: Path) -> None:
    """A short slice of the table in docs/quantization.md, with room for how short it is."""
    tokenizer = Tokenizer(TINY)
    calibration, unseen = windows(CALIBRATION, tokenizer, 6, 256), windows(TEXT, tokenizer, 3, 256)
    grouped = {"bits": 3, "group": 32}
    chosen = Settings(**grouped, true_sequential=False)
    found = {}
    for name in ("int4", "awq", "gptq", "int8"):
        recipe = RECIPES[name]
        settled = recipe.settled(chosen if recipe.bits else Settings())
        quantize(Job(TINY, tmp_path / name, recipe, settled, calibration if recipe.calibrates else []), lambda *_: None)
        found[name] = divergence(tmp_path / name, TINY, unseen)
    assert found["gptq"] < 0.6 * found["int4"]
    assert found["awq"] < 0.9 * found["int4"]
    assert found["int8"] < 0.05 * found["int4"]


def test_sizes_of_the_files(tmp_path: Path) -> None:
    """GPTQ in 4 bits, groups of 128: at most a quarter of float32, scales and zero points and all."""
    recipe = RECIPES["gptq"]
    calibration = windows(CALIBRATION, Tokenizer(TINY), 1, 64)
    chosen = recipe.settled(Settings(true_sequential=False, act_order=False))
    quantize(Job(TINY, tmp_path / "out", recipe, chosen, calibration), lambda *_: None)
    tensors = {n: t for p in (tmp_path / "out").glob("*.safetensors") for n, t in load_file(p).items()}
    size = sum(t.nbytes for n, t in tensors.items() if "_proj." in n)
    original = load_file(TINY / "model.safetensors")
    assert size < 0.15 * sum(4 * t.numel() for n, t in original.items() if "_proj." in n)
