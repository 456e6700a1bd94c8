"""Draws docs/images/architecture.svg: `python -m hack.picture`. Boxes and arrows are data, so a change is a line."""

from pathlib import Path

FONT = "font-family='system-ui, sans-serif'"
RUNTIME = ["worker API, step loop, scheduler", "paged KV cache, model"]
# x, y, width, height, title, lines below it, fill
BOXES = [
    (20, 150, 120, 70, "Client", ["openai, curl, chat"], "#f5f5f5"),
    (20, 300, 120, 70, "Person", ["kubectl, wherry"], "#f5f5f5"),
    (210, 20, 690, 400, "", [], "#fbfbfe"),
    (240, 140, 190, 90, "Router", ["OpenAI API on one address", "balancing, retry, draining"], "#e3f2fd"),
    (
        560,
        60,
        300,
        80,
        "Group a: runtime pod",
        ["worker API, step loop, scheduler", "paged KV cache, model"],
        "#e8f5e9",
    ),
    (
        560,
        165,
        300,
        80,
        "Group b: runtime pod",
        ["worker API, step loop, scheduler", "paged KV cache, model"],
        "#e8f5e9",
    ),
    (240, 300, 190, 90, "API server", ["LLMDeployment, Pods,", "Service, Secret, Events"], "#ede7f6"),
    (560, 300, 300, 90, "Operator", ["snapshot → plan → act → status", "leader by Lease"], "#fff3e0"),
]
# from x, y, to x, y, label, label x, label y
ARROWS = [
    (140, 185, 240, 185, "HTTP, SSE", 148, 176),
    (140, 335, 240, 335, "apply", 165, 326),
    (430, 170, 560, 105, "/execute", 458, 118),
    (430, 195, 560, 205, "SSE events", 462, 192),
    (335, 300, 335, 230, "watch pods", 345, 270),
    (560, 355, 430, 355, "apply, delete", 462, 374),
    (430, 328, 560, 328, "watch", 480, 320),
    (710, 300, 710, 245, "/load", 718, 277),
]


def text(x: float, y: float, size: int, words: str, more: str = "") -> str:
    return f"<text x='{x}' y='{y}' font-size='{size}' {more}>{words}</text>"


def box(x: int, y: int, w: int, h: int, title: str, lines: list[str], fill: str) -> str:
    middle = x + w / 2
    parts = [f"<rect x='{x}' y='{y}' width='{w}' height='{h}' rx='8' fill='{fill}' stroke='#607d8b'/>"]
    parts.append(text(middle, y + 28, 15, title, "text-anchor='middle' font-weight='600'"))
    parts += [text(middle, y + 50 + 18 * i, 12, line, "text-anchor='middle'") for i, line in enumerate(lines)]
    return "\n".join(parts)


def arrow(x1: int, y1: int, x2: int, y2: int, label: str, lx: int, ly: int) -> str:
    return (
        f"<line x1='{x1}' y1='{y1}' x2='{x2}' y2='{y2}' stroke='#455a64' stroke-width='1.5' marker-end='url(#a)'/>"
        + text(lx, ly, 12, label, "fill='#455a64'")
    )


def picture() -> str:
    head = (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 920 440' {FONT} role='img' "
        "aria-label='Clients reach the router, which streams from groups of runtime pods; people apply an "
        "LLMDeployment, which the operator turns into those pods'>\n<rect width='920' height='440' fill='white'/>"
        "<defs><marker id='a' viewBox='0 0 10 10' refX='9' refY='5' markerWidth='7' markerHeight='7' orient='auto'>"
        "<path d='M0 0 10 5 0 10z' fill='#455a64'/></marker></defs>"
    )
    cluster = text(226, 44, 13, "Kubernetes, or local mode", "fill='#607d8b'")
    return "\n".join([head, *[box(*b) for b in BOXES], cluster, *[arrow(*a) for a in ARROWS], "</svg>\n"])


if __name__ == "__main__":
    Path(__file__).parent.parent.joinpath("docs/images/architecture.svg").write_text(picture())
