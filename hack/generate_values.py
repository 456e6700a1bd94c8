"""Writes docs/reference/values.md from the comments in the chart's values.yaml. Run by `make generate`.

Every value has a comment `# -- what it is` above it, as helm-docs has it. `python -m hack.generate_values [--check]`.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
VALUES = ROOT / "charts" / "wherry" / "values.yaml"
PAGE = ROOT / "docs" / "reference" / "values.md"
HEAD = """# Values of the Helm chart

<!-- Generated from charts/wherry/values.yaml by `make generate`; do not edit. -->

A value that is not in this table is refused, and so is one of another type.

| Value | Default | What it is |
|---|---|---|
"""


def comment_above(lines: list[str], line: int) -> str | None:
    """The text of the comment that ends right above `line` (counted from 0), if it starts with `# --`."""
    texts: list[str] = []
    for text in reversed(lines[:line]):
        stripped = text.strip()
        if not stripped.startswith("#"):
            break
        texts.append(stripped.removeprefix("#").strip())
        if texts[-1].startswith("--"):
            return " ".join(reversed(texts)).removeprefix("--").strip()
    return None


def rows(node: yaml.Node, value: Any, lines: list[str], path: str = "") -> Iterator[tuple[str, str, str]]:
    """(path, default, description) of each described value; those inside a described one are part of its default.

    Raises:
        LookupError: a value has no description.
    """
    if not isinstance(node, yaml.MappingNode):  # a leaf, and nothing above it said what it is
        raise LookupError(f"{VALUES.name}: {path} has no comment that begins with `# --`")  # noqa: TRY004
    for key, child in node.value:
        name = f"{path}.{key.value}".lstrip(".")
        if (text := comment_above(lines, key.start_mark.line)) is not None:
            yield name, json.dumps(value[key.value]), text
        else:
            yield from rows(child, value[key.value], lines, name)


def page() -> str:
    """The page's text."""
    source = VALUES.read_text()
    node = yaml.compose(source, Loader=yaml.SafeLoader)
    table = rows(node, yaml.safe_load(source), source.splitlines())
    return HEAD + "".join(f"| `{name}` | `{default}` | {text} |\n" for name, default, text in table)


def main() -> int:
    text = page()
    if "--check" in sys.argv[1:]:
        return int(not PAGE.exists() or PAGE.read_text() != text)
    PAGE.parent.mkdir(parents=True, exist_ok=True)
    PAGE.write_text(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
