"""Line charts as SVG, without a library: a few hundred bytes that a page of documentation shows as they are."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 400, 300
LEFT, RIGHT, TOP, BOTTOM = 62, 16, 34, 48  # margins
COLORS = ("#1565c0", "#ef6c00", "#2e7d32", "#6a1b9a", "#c62828", "#00838f", "#5d4037", "#455a64")
LEGEND_LINE = 18


@dataclass(frozen=True)
class Line:
    """Points (x, low, middle, high): the middles are joined, low to high is a bar."""

    name: str
    points: Sequence[tuple[float, float, float, float]]


@dataclass(frozen=True)
class Chart:
    """One frame with its lines. x is logarithmic (sizes double) unless it is told not to be, y starts at zero."""

    title: str
    x_label: str
    y_label: str
    lines: Sequence[Line]
    log_x: bool = True


def ticks(highest: float) -> list[float]:
    """Three to six round numbers from zero that reach `highest`."""
    if highest <= 0:
        return [0.0, 1.0]
    step = float(10 ** math.floor(math.log10(highest / 3)))
    while highest / step > 5:
        step *= 2 if highest / step <= 10 else 5
    return [i * step for i in range(math.ceil(highest / step - 1e-9) + 1)]


def _text(x: float, y: float, words: str, size: int = 12, more: str = "text-anchor='middle'") -> str:
    return f"<text x='{x:.1f}' y='{y:.1f}' font-size='{size}' fill='#37474f' {more}>{escape(words)}</text>"


def _chart(chart: Chart) -> list[str]:
    points = [p for line in chart.lines for p in line.points]
    xs = sorted({p[0] for p in points})
    marks = ticks(max((p[3] for p in points), default=0.0))
    inner_width, inner_height = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM

    def along(x: float) -> float:
        return math.log2(x) if chart.log_x else x

    low, high = (along(xs[0]), along(xs[-1])) if xs else (0.0, 1.0)

    def at_x(x: float) -> float:
        return LEFT + inner_width * ((along(x) - low) / (high - low) if high > low else 0.5)

    def at_y(y: float) -> float:
        return TOP + inner_height * (1 - y / marks[-1])

    out = [_text(LEFT + inner_width / 2, 20, chart.title, 14, "text-anchor='middle' font-weight='600'")]
    for mark in marks:
        y = at_y(mark)
        out.append(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' y1='{y:.1f}' y2='{y:.1f}' stroke='#eceff1'/>")
        out.append(_text(LEFT - 6, y + 4, f"{mark:g}", 11, "text-anchor='end'"))
    out += [_text(at_x(x), HEIGHT - BOTTOM + 16, f"{x:g}", 11) for x in xs]
    out.append(_text(LEFT + inner_width / 2, HEIGHT - 12, chart.x_label))
    out.append(_text(14, TOP + inner_height / 2, chart.y_label, 12, _upright(14, TOP + inner_height / 2)))
    for index, line in enumerate(chart.lines):
        color = COLORS[index % len(COLORS)]
        path = " ".join(f"{at_x(x):.1f},{at_y(middle):.1f}" for x, _, middle, _ in line.points)
        out.append(f"<polyline points='{path}' fill='none' stroke='{color}' stroke-width='2'/>")
        for x, lowest, middle, highest in line.points:
            h = at_x(x)
            out.append(
                f"<line x1='{h:.1f}' x2='{h:.1f}' y1='{at_y(lowest):.1f}' y2='{at_y(highest):.1f}' stroke='{color}'/>"
            )
            out.append(f"<circle cx='{h:.1f}' cy='{at_y(middle):.1f}' r='3' fill='{color}'/>")
    return out


def _upright(x: float, y: float) -> str:
    return f"text-anchor='middle' transform='rotate(-90 {x:.1f} {y:.1f})'"


def _legend(names: Sequence[str], y: float) -> list[str]:
    out = []
    for index, name in enumerate(names):
        line = y + LEGEND_LINE * index
        out.append(f"<rect x='{LEFT}' y='{line - 9:.1f}' width='14' height='4' fill='{COLORS[index % len(COLORS)]}'/>")
        out.append(_text(LEFT + 22, line - 3, name, 12, ""))
    return out


def page(charts: Sequence[Chart]) -> str:
    """The charts side by side, and one legend: lines of the same place have the same name in all of them."""
    names = [line.name for line in charts[0].lines]
    width, height = WIDTH * len(charts), HEIGHT + LEGEND_LINE * len(names) + 8
    title = escape("; ".join(c.title for c in charts), quote=True)
    out = [
        (
            f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' "
            f"font-family='system-ui, sans-serif' role='img' aria-label='{title}'>"
        ),
        f"<rect width='{width}' height='{height}' fill='white'/>",
    ]
    for index, chart in enumerate(charts):
        out += [f"<g transform='translate({WIDTH * index} 0)'>", *_chart(chart), "</g>"]
    return "\n".join([*out, *_legend(names, HEIGHT + LEGEND_LINE), "</svg>"]) + "\n"
