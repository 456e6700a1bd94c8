"""The reference pages say what the code says."""

import difflib

import pytest
from hack.reference import outputs

PAGES = outputs()


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_page_is_up_to_date(path):
    shown, current = path.read_text(), PAGES[path]
    difference = "".join(difflib.unified_diff(shown.splitlines(True), current.splitlines(True), str(path), "generated"))
    assert not difference, f"run `make generate` and commit the result\n{difference}"
