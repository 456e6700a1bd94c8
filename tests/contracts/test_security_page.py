"""docs/security.md: each row names tests, and they are there."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text()
_TEST = re.compile(r"`(tests/[\w/]+\.py)::(\w+)`")
_CVE = re.compile(r"\b(?:CVE|PYSEC)-\d{4}-\d+\b")
# Tables whose last column is the test.
ROWS = [
    line.strip("|").split(" | ")
    for table in re.findall(r"^\| [^\n]+ \| test \|\n\|[-|]+\|\n((?:\|[^\n]*\n)+)", PAGE, re.MULTILINE)
    for line in table.splitlines()
]


@cache
def names_in(path: str) -> frozenset[str]:
    tree = ast.parse((ROOT / path).read_text())
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, kinds) and node.name.startswith("test_"))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[0].strip()[:40])
def test_every_row_has_tests_that_exist(row: list[str]) -> None:
    named = _TEST.findall(row[-1])
    assert named
    assert [(path, name) for path, name in named if name not in names_in(path)] == []
    assert _TEST.sub("", row[-1]).replace(",", "").strip() == "", "nothing but names of tests"


def test_no_class_is_left_out() -> None:
    """16 classes of attacks and 9 complaints; a row that goes must be missed."""
    assert len(ROWS) == 25
    assert len(set(_CVE.findall(PAGE))) == 31
