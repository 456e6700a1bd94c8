"""Bits by sensitivity: who gets which, what is written, and that it is worth it."""

import itertools
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.engines import CHECKOUT
from tests.runtime.test_quantization_methods import CALIBRATION, RECIPES, TEXT, divergence, some_windows
from tests.runtime.test_quantization_methods import small as small  # a fixture
from typer.testing import CliRunner

from wherry_cli.main import app
from wherry_runtime.calibration.allocation import Option, within
from wherry_runtime.calibration.pipeline import Job, quantize
from wherry_runtime.calibration.sensitivity import Sensitivity, mixed, sensitivities
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.quantized import QuantizedCheckpoint
from wherry_runtime.quantization.recipes.base import Settings
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

GPTQ = RECIPES["gptq"]
MODELS = CHECKOUT / "examples" / "models"


def options(*pairs: tuple[float, float]) -> list[Option]:
    return [Option(*pair) for pair in pairs]


TWO = [options((2, 8), (4, 2), (8, 0)), options((2, 2), (4, 0.5), (8, 0))]


@pytest.mark.parametrize(
    "matrices, budget, chosen",
    [
        (TWO, 4, [0, 0]),
        (TWO, 6, [1, 0]),  # where it saves the most
        (TWO, 8, [1, 1]),
        (TWO, 12, [2, 1]),
        (TWO, 15.9, [2, 1]),
        (TWO, 16, [2, 2]),
        (TWO, 1000, [2, 2]),
        ([options((4, 1), (2, 3), (3, 2.9))], 3.5, [1]),  # in any order; one above the hull is never taken
        ([options((2, 1), (4, 1), (8, 1))], 100, [0]),  # no more than is of use
        ([options((2, 5), (9, 0)), options((2, 4), (3, 3.9))], 5, [0, 1]),  # what fits, where the best step does not
        ([], 0, []),
    ],
)
def test_bits_go_where_they_save_the_most(matrices: list[list[Option]], budget: float, chosen: list[int]) -> None:
    assert within(matrices, budget) == chosen


def test_a_budget_that_is_too_small_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match="take 4 together"):
        within(TWO, 3.9)
    one = Sensitivity(("a",), 10, options((25, 1), (40, 0)))
    with pytest.raises(ModelError, match=r"gptq takes 2\.50 bits per weight at least"):
        mixed([one], GPTQ, Settings(bits_per_weight=2.4))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.lists(st.tuples(st.integers(1, 12), st.integers(0, 50)), min_size=1, max_size=4), min_size=1, max_size=4
    ),
    st.integers(0, 30),
)
def test_close_to_the_best_of_all_choices(given_: list[list[tuple[int, int]]], more: int) -> None:
    matrices = [options(*((float(s), float(loss)) for s, loss in matrix)) for matrix in given_]
    budget = sum(min(o.size for o in m) for m in matrices) + more
    every = [c for c in itertools.product(*matrices) if sum(o.size for o in c) <= budget]
    best = min(sum(o.loss for o in c) for c in every)
    found = [m[i] for m, i in zip(matrices, within(matrices, budget), strict=True)]
    assert sum(o.size for o in found) <= budget
    largest = max(max(o.loss for o in m) - min(o.loss for o in m) for m in matrices)
    assert best <= sum(o.loss for o in found) <= best + largest


def test_a_mixed_checkpoint_says_what_each_matrix_is_and_loads(small: Path, tmp_path: Path) -> None:
    target, settled = tmp_path / "out", GPTQ.settled(Settings(bits_per_weight=4.0))
    reports: list[int] = []
    found = sensitivities(small, target, GPTQ, settled, some_windows(small), lambda done, total: reports.append(done))
    assert reports == [0, 1, 2]
    assert not list(tmp_path.iterdir())
    assert [len(one.names) for one in found] == [3, 1, 2, 1] * 2
    mix = mixed(found, GPTQ, settled)
    assert len({(s.bits, s.group) for s in mix.values()}) > 1
    quantize(Job(small, target, GPTQ, settled, some_windows(small), mix), lambda done, total: None)
    groups = json.loads((target / "config.json").read_text())["quantization_config"]["config_groups"]
    told = {name: g["weights"] for g in groups.values() for name in g["targets"]}
    assert {n: (w["num_bits"], w["group_size"]) for n, w in told.items()} == {
        n: (s.bits, s.group) for n, s in mix.items()
    }
    checkpoint = QuantizedCheckpoint.of(target)
    assert checkpoint is not None
    formats = checkpoint.formats()
    for name, own in mix.items():
        assert formats[name].method == ("int8" if own.bits == 8 else "int4"), name
    losses = [divergence(target, small, some_windows(small, 2), backend=b) for b in ("native", "pytorch")]
    assert losses[0] == pytest.approx(losses[1], rel=0.3)
    assert max(losses) < 0.1


def test_what_is_more_sensitive_in_the_sample_model_gets_more_bits(tmp_path: Path) -> None:
    """A short slice of the table in docs/quantization.md: less is lost in fewer bits."""
    model = MODELS / "draft"
    tokenizer = Tokenizer(model)
    calibration, unseen = windows(CALIBRATION, tokenizer, 6, 256), windows(TEXT, tokenizer, 3, 256)
    settled = GPTQ.settled(Settings(bits_per_weight=3.4, true_sequential=False))
    found = sensitivities(model, tmp_path / "mixed", GPTQ, settled, calibration, lambda *_: None)
    mix = mixed(found, GPTQ, settled)
    of = {(s.bits, s.group): i for i, s in enumerate(GPTQ.mixes)}
    taken = sum(one.options[of[mix[one.names[0]].bits, mix[one.names[0]].group]].size for one in found)
    assert 3.2 < taken / sum(one.weights for one in found) <= 3.4
    uniform = GPTQ.settled(Settings(bits=3, group=32, true_sequential=False))
    quantize(Job(model, tmp_path / "mixed", GPTQ, settled, calibration, mix), lambda *_: None)
    quantize(Job(model, tmp_path / "uniform", GPTQ, uniform, calibration), lambda *_: None)
    losses = {name: divergence(tmp_path / name, model, unseen) for name in ("mixed", "uniform")}
    assert losses["mixed"] < 0.9 * losses["uniform"]


@pytest.mark.parametrize(
    "method, chosen, message",
    [
        ("awq", {"bits_per_weight": 4.0}, "awq has the same bits for all matrices"),
        ("gptq", {"bits_per_weight": -1.0}, "above zero"),
        ("gptq", {"bits_per_weight": 4.0, "bits": 4}, "leave out the others"),
        ("gptq", {"bits_per_weight": 4.0, "symmetric": False}, "leave out the others"),
        ("gptq", {"sparsity": 0.5}, "gptq has no choice of sparsity"),
        ("prune", {"sparsity": 1.0}, "between 0 and 1"),
    ],
)
def test_settings_that_do_not_go_together(method: str, chosen: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        RECIPES[method].settled(Settings(**chosen))  # type: ignore[arg-type]


def test_the_command(small: Path, tmp_path: Path) -> None:
    arguments = ["--method", "gptq", "--calibration", str(CALIBRATION), "--windows", "2", "--length", "32"]
    target = tmp_path / "out"
    command = ["quantize", str(small), str(target), *arguments]
    done = CliRunner().invoke(app, [*command, "--bits-per-weight", "4.2"])
    assert done.exit_code == 0, done.output
    assert "pack-quantized" in (target / "config.json").read_text()
    again = CliRunner().invoke(app, [*command, "--bits-per-weight", "4.2"])
    assert again.exit_code == 1
    assert "is there already" in again.output
    few = CliRunner().invoke(app, [*command[:2], str(tmp_path / "few"), *arguments, "--bits-per-weight", "1"])
    assert few.exit_code == 1
    assert "bits per weight at least" in few.output
