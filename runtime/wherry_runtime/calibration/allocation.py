"""Shares out bits among matrices, so that together they lose least."""

from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple


class Option(NamedTuple):
    """One way of writing a matrix: what it takes, and what it costs."""

    size: float
    loss: float


def within(matrices: Sequence[Sequence[Option]], budget: float) -> list[int]:
    """An option of each matrix, all of them together no larger than `budget`, that lose little.

    From the smallest of each, the step that saves the most loss for its size is taken again and again, along the lower
    convex hull of each matrix's options: what that loses is at most the saving of one step more than the least
    possible, which is a knapsack problem.

    Raises:
        ValueError: not even the smallest options are so small; the message says how large they are.
    """
    hulls = [_hull(options) for options in matrices]
    chosen = [0] * len(hulls)
    left = budget - sum(options[hull[0]].size for options, hull in zip(matrices, hulls, strict=True))
    if left < 0:
        raise ValueError(f"the smallest options take {budget - left:g} together")
    steps = []
    for matrix, (options, hull) in enumerate(zip(matrices, hulls, strict=True)):
        for place, (a, b) in enumerate(pairwise(hull), 1):
            size, saved = options[b].size - options[a].size, options[a].loss - options[b].loss
            steps.append((-saved / size, matrix, place, size))
    for _, matrix, place, size in sorted(steps):
        # A step that does not fit bars those behind it of the same matrix, but none of the others.
        if size <= left and chosen[matrix] == place - 1:
            chosen[matrix], left = place, left - size
    return [hull[place] for hull, place in zip(hulls, chosen, strict=True)]


def _hull(options: Sequence[Option]) -> list[int]:
    """The options on the lower convex hull of loss over size, from the smallest on, as long as more size loses less."""
    hull: list[int] = []
    for i in sorted(range(len(options)), key=lambda i: options[i]):
        if hull and options[i].loss >= options[hull[-1]].loss:
            continue
        while len(hull) > 1 and _slope(options, hull[-2], hull[-1]) >= _slope(options, hull[-1], i):
            hull.pop()
        hull.append(i)
    return hull


def _slope(options: Sequence[Option], a: int, b: int) -> float:
    return (options[b].loss - options[a].loss) / (options[b].size - options[a].size)
