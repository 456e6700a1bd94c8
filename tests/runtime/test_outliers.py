"""Methods that mind outliers of activations, on a model that has some."""

import json
from pathlib import Path

import pytest
from benchmarks.quantization.outliers import with_outliers
from tests.runtime.engines import CHECKOUT, TINY
from typer.testing import CliRunner

from wherry_cli.main import app
from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.kernels.cpu import library
from wherry_runtime.quality.measure import Subject, compare
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

TEXT = CHECKOUT / "benchmarks" / "data" / "dev.txt"
LENGTH = 192


def divergence(directory: Path, backend: str = "auto") -> float:
    text = windows(TEXT, Tokenizer(TINY), 2, LENGTH)
    settings = {"dtype": "float32", "kv_cache_dtype": "float32", "threads": 1}
    found, expected = (
        Subject(EngineConfig(model_name="m", model_uri=str(path), backend=backend, **settings), LENGTH)
        for path in (directory, TINY)
    )
    return compare(found.scorer, expected.scorer, text, lambda: None).summary().divergence


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sample model with outliers of 64 times the size, and the same answers."""
    directory = tmp_path_factory.mktemp("outliers") / "model"
    with_outliers(TINY, directory, 64)
    assert divergence(directory, "pytorch") < 1e-9
    return directory


def quantized(model: Path, method: str, *more: str) -> Path:
    target = model.with_name(f"{method}-{len(more)}")
    made = CliRunner().invoke(app, ["quantize", str(model), str(target), "--method", method, *more])
    assert made.exit_code == 0, made.output
    return target


@pytest.fixture(scope="module")
def apart(model: Path) -> Path:
    """Quantized with the threshold of the paper."""
    return quantized(model, "llm-int8")


@pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")
def test_outliers_spoil_int8_unless_they_are_kept_apart(model: Path, apart: Path) -> None:
    spoilt = divergence(quantized(model, "int8"))
    assert spoilt > 0.005
    assert divergence(apart) < 0.1 * spoilt
    # So high a threshold leaves them where they are: the same as int8.
    assert divergence(quantized(model, "llm-int8", "--outliers", "100000")) == pytest.approx(spoilt, rel=1e-3)


@pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine")
def test_awqs_scales_take_outliers_away_before_gptq_rounds(model: Path) -> None:
    text = ("--calibration", str(TEXT.with_name("calibration.txt")), "--windows", "6", "--length", "192")
    alone, both = (
        divergence(quantized(model, method, *text, "--no-true-sequential")) for method in ("gptq", "awq-gptq")
    )
    assert both < 0.3 * alone


def test_plain_weights_round_no_activations(apart: Path) -> None:
    assert json.loads((apart / "config.json").read_text())["quantization_config"]["llm_int8_threshold"] == 6.0
    assert divergence(apart, "pytorch") < 0.001


def test_a_threshold_is_for_the_method_that_has_one(model: Path) -> None:
    asked = ["quantize", str(model), str(model.with_name("none")), "--method", "int8", "--outliers", "6"]
    refused = CliRunner().invoke(app, asked)
    assert refused.exit_code == 1
    assert "int8 keeps no outliers of 6 apart" in refused.output
