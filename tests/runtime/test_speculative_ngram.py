"""Prompt lookup against a plain search, and that it costs the same however long the sequence is."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wherry_runtime.engine.speculative.ngram import MAX_MATCH, MAX_PLACES, MIN_MATCH, NgramIndex


def index_of(tokens: list[int]) -> NgramIndex:
    index = NgramIndex()
    index.extend(tokens)
    return index


CASES: list[tuple[str, list[int], int, list[int], int]] = [
    ("empty", [], 4, [], 0),
    ("too short", [1, 2], 4, [], 0),
    ("nothing came before", [1, 2, 3, 4, 5], 4, [], 0),
    ("one equal token is not enough", [1, 2, 3, 1], 4, [], 0),
    ("a pair", [1, 2, 3, 4, 1, 2], 2, [3, 4], 2),
    ("the most recent of equals", [1, 2, 3, 1, 2, 4, 1, 2], 1, [4], 2),
    ("the longest before the most recent", [7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 1, [3], 3),
    ("guesses go on past the end", [1, 2, 3, 1, 2], 7, [3, 1, 2, 3, 1, 2, 3], 2),
    ("one token over and over", [5, 5, 5], 4, [5, 5, 5, 5], 2),
    ("none wanted", [1, 2, 3, 1, 2], 0, [], 0),
]


@pytest.mark.parametrize(("tokens", "count", "guesses", "match"), [c[1:] for c in CASES], ids=[c[0] for c in CASES])
def test_guesses(tokens: list[int], count: int, guesses: list[int], match: int) -> None:
    assert index_of(tokens).propose(count) == (guesses, match)


def searched(tokens: list[int], count: int) -> tuple[list[int], int]:
    """The same by definition: every place, compared token by token."""
    best = (0, -1)
    for place in range(MIN_MATCH, len(tokens)):
        length = 0
        while length < min(MAX_MATCH, place) and tokens[place - 1 - length] == tokens[-1 - length]:
            length += 1
        if length >= MIN_MATCH:
            best = max(best, (length, place))
    length, place = best
    if place < 0 or count < 1:
        return [], 0
    return [tokens[place + i % (len(tokens) - place)] for i in range(count)], length


@settings(max_examples=400, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=40), st.integers(0, 8))
def test_equals_a_plain_search(tokens: list[int], count: int) -> None:
    """Where pairs are not more frequent than places are looked at."""
    pairs = list(itertools.pairwise(tokens))
    if pairs and max(pairs.count(p) for p in pairs) <= MAX_PLACES:
        assert index_of(tokens).propose(count) == searched(tokens, count)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 60), max_size=5))
def test_adding_bit_by_bit_is_the_same(tokens: list[int], cuts: list[int]) -> None:
    index = NgramIndex()
    for cut in [*sorted(cuts), len(tokens)]:
        index.extend(tokens[:cut] if cut > len(index) else tokens[: len(index)])
    assert len(index) == len(tokens)
    assert index.propose(6) == index_of(tokens).propose(6)


def test_a_lookup_looks_at_a_bounded_number_of_places() -> None:
    """The pair comes a thousand times; only the last ones count, so the long match far back is not found."""
    far = [9, 9, 9, 9, 1, 2, 7]
    tokens = far + [3, 1, 2, 4] * 1000 + [9, 9, 9, 9, 1, 2]
    guesses, match = index_of(tokens).propose(1)
    assert guesses == [4]
    assert match == 2


def test_matches_are_told_apart_up_to_a_length() -> None:
    tokens = list(range(100)) * 2
    assert index_of(tokens).propose(3) == ([0, 1, 2], MAX_MATCH)
