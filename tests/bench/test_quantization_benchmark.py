"""The tables about `auto` and AWQ, from figures made by hand."""

from typing import Any

from benchmarks.quantization import auto, awq

from wherry_runtime.calibration.auto import candidates


def figures() -> list[list[Any]]:
    """Every candidate, each larger one losing a tenth of the one before."""
    rows: list[list[Any]] = []
    for place, candidate in enumerate(candidates()):
        mean = 0.1 / 10**place
        rows.append([str(candidate), 100 + place, [mean, 0.0], [[mean, 0.0], [mean, 0.0]]])
    return rows


def test_auto_that_measures_what_is_true_is_always_right() -> None:
    told = auto.report({"draft": figures()})
    assert told.count("auto is right in 30 of 30 cases (100%).") == 2


def test_a_case_is_wrong_where_the_other_half_loses_more() -> None:
    rows = figures()
    rows[1][3] = [[0.01, 0.0], [0.011, 0.0]]  # the limit of 0.01 lies between its halves
    told = auto.report({"draft": rows})
    first, second = (str(candidate) for candidate in candidates()[1:3])
    assert "With --measure-on, auto is right in 28 of 30 cases (93%); not in" in told
    assert f"| draft | 0.01 | {first} | {second} |" in told
    assert f"| draft | 0.01 | {second} | {first} |" in told
    assert "With the calibration text alone, auto is right in 29 of 30 cases (97%)" in told


def test_the_true_best_is_the_smallest_and_then_the_one_that_loses_least() -> None:
    rows = [
        auto.Tried("large", 9, (0, 0), ((0.0, 0), (0.0, 0))),
        auto.Tried("a", 5, (0, 0), ((0.2, 0), (0.4, 0))),
        auto.Tried("b", 5, (0, 0), ((0.3, 0), (0.1, 0))),
    ]
    assert [auto.true_best(rows, half, 0.5) for half in (0, 1)] == ["a", "b"]
    assert auto.true_best(rows, 0, 0.1) == "large"
    assert auto.true_best(rows, 0, -1.0) == auto.NOTHING


def test_awq_beside_gptq() -> None:
    found = {
        "draft; code; 1; int4 g128": [0.1, 0.2, 3, 8],
        "draft; code; 1; int3 g32": [0.4, 0.3, 1, 8],
    }
    told = awq.report(found)
    assert "| draft | code | 1 | **0.10000** | 0.20000 | 3 of 8 | 0.40000 | 0.30000 | 1 of 8 |" in told
    assert "AWQ is better in 1 of 2 cases (50%), and in 4 of 16 matrices (25%)" in told
