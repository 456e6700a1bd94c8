"""Quality: what is made of losses, and that engines which compute the same thing score the same."""

import json
from pathlib import Path
from typing import Any

import pytest
from benchmarks.engine import models, quality
from benchmarks.engine.process import EngineProcess
from benchmarks.engine.variants import Variant
from benchmarks.engine.workload import Job

from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows


def run(losses: list[list[float]], likeliest: list[list[int]]) -> dict[str, Any]:
    return {"losses": losses, "likeliest": likeliest}


def test_summary() -> None:
    reference = run([[1.0, 2.0], [3.0]], [[1, 2], [3]])
    assert quality.summary(reference, reference) == pytest.approx(
        {"perplexity": 7.389056, "change": 0.0, "error": 0.0, "agreement": 1.0, "positions": 3}
    )
    worse = quality.summary(run([[1.1, 2.1], [3.1]], [[1, 0], [3]]), reference)
    assert worse["change"] == pytest.approx(0.105171, rel=1e-4)
    assert worse["error"] == pytest.approx(0.0, abs=1e-9)
    assert worse["agreement"] == pytest.approx(2 / 3)


def test_table_names_the_distance_to_q8_0_only_where_it_was_scored() -> None:
    row = {"perplexity": 2.0, "change": 0.01, "error": 0.001, "agreement": 0.99, "positions": 3}
    alone = quality.table({"wherry int8 g128": row})
    assert "| Wherry int8 g128 | 2.000 | +1.000% ± 0.100% | – | 99.00% |" in alone
    both = quality.table({"wherry int8 g128": row, "llamacpp q8_0": {**row, "perplexity": 1.0}})
    assert "+100.000%" in both


def test_wherry_in_float32_scores_as_the_reference(tmp_path: Path) -> None:
    file = tmp_path / "windows.json"
    file.write_text(
        json.dumps([w[: 24 + i] for i, w in enumerate(windows(quality.TEXT, Tokenizer(models.SAMPLE), 2, 32))])
    )
    runs = []
    for variant in (quality.REFERENCE, Variant("wherry", "f32", {"dtype": "float32"})):
        job = Job(
            engine=variant.engine,
            variant=variant.name,
            model=str(models.SAMPLE),
            weights=str(models.SAMPLE),
            vocab_size=models.vocab_size(models.SAMPLE),
            threads=1,
            options=variant.options,
            windows=str(file),
        )
        with EngineProcess(job) as engine:
            runs.append(engine.ask())
    assert [len(w) for w in runs[0]["losses"]] == [23, 24]
    found = quality.summary(runs[1], runs[0])
    assert found["agreement"] == 1.0
    assert found["change"] == pytest.approx(0.0, abs=1e-4)
