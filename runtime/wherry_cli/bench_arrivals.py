"""When requests come: arrival times, made up or read from a trace. Pure, and repeatable by seed."""

import csv
import json
import random
from collections.abc import Iterator
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any

import msgspec

from wherry_cli.bench_flags import Pattern, Unit

# Columns as published traces have them: Azure's LLM inference traces, BurstGPT, Mooncake; in lower case.
_TIME = ("timestamp", "arrival_time")
_INPUT = ("contexttokens", "input_length", "input_tokens", "request tokens")
_OUTPUT = ("generatedtokens", "output_length", "output_tokens", "response tokens")
_BLOCKS = "hash_ids"


class TraceError(Exception):
    """The trace cannot be replayed. The message names the file, the line and what is missing."""


class Record(msgspec.Struct, frozen=True):
    """One request of a trace. `blocks` name the prompt's blocks of 512 tokens, where the trace has them: equal names
    are equal tokens."""

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...] = ()


def arrivals(pattern: Pattern, rate: float, burst: int, seed: int) -> Iterator[float]:
    """Seconds from the beginning at which requests come, without end, `rate` of them a second on average.

    Args:
        pattern: `poisson`: each independent of the others; `constant`: evenly spaced; `burst`: `burst` at a time,
            evenly spaced.
    """
    if pattern == "poisson":
        rng = random.Random(f"arrivals {seed}")  # noqa: S311 - repeatable on purpose
        at = 0.0
        while True:
            at += rng.expovariate(rate)
            yield at
    size = burst if pattern == "burst" else 1
    for number in count():
        yield (number // size) * size / rate


def read_trace(path: Path, unit: Unit = "auto", speed: float = 1.0) -> list[Record]:
    """The records of a CSV or JSONL file by time, the first at 0.

    Args:
        unit: of timestamps that are numbers. `auto`: milliseconds in JSONL (Mooncake), seconds in CSV (BurstGPT).
        speed: how many times as fast it is replayed.

    Raises:
        TraceError: it cannot be read, or a line lacks a column.
    """
    lines = path.suffix != ".csv"
    scale = {"auto": 1e-3 if lines else 1.0, "s": 1.0, "ms": 1e-3}[unit]
    try:
        rows = list(_rows(path, lines=lines))
    except (OSError, ValueError, csv.Error) as error:
        raise TraceError(f"cannot read the trace {path}: {error}") from None
    found = sorted((_record(path, number, row, scale) for number, row in rows), key=lambda record: record.at_s)
    if not found:
        raise TraceError(f"the trace {path} has no requests")
    first = found[0].at_s
    return [msgspec.structs.replace(record, at_s=(record.at_s - first) / speed) for record in found]


def _rows(path: Path, *, lines: bool) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="") as file:
        if not lines:
            yield from enumerate(csv.DictReader(file), 2)
            return
        for number, line in enumerate(file, 1):
            if line.strip():
                row = json.loads(line)
                if not isinstance(row, dict):
                    raise ValueError(f"line {number} is not a JSON object")
                yield number, row


def _record(path: Path, number: int, row: dict[str, Any], scale: float) -> Record:
    fields = {str(name).strip().lower(): value for name, value in row.items() if value not in (None, "")}
    found = []
    for names in (_TIME, _INPUT, _OUTPUT):
        name = next((name for name in names if name in fields), None)
        if name is None:
            raise TraceError(f"{path}, line {number}: it has none of the columns {', '.join(names)}")
        found.append(fields[name])
    try:
        at_s = _seconds(found[0], scale)
        blocks = tuple(int(block) for block in fields.get(_BLOCKS, ()))
        return Record(at_s, max(int(found[1]), 1), max(int(found[2]), 1), blocks)
    except (TypeError, ValueError) as error:
        raise TraceError(f"{path}, line {number}: {error}") from None


def _seconds(value: Any, scale: float) -> float:
    """A number in the trace's unit, or a date and time as in `2023-11-16 18:15:46.6805900`."""
    try:
        return float(value) * scale
    except ValueError:
        whole, _, fraction = str(value).strip().removesuffix("Z").partition(".")
        moment = datetime.fromisoformat(whole)
        return moment.replace(tzinfo=moment.tzinfo or UTC).timestamp() + (float(f"0.{fraction}") if fraction else 0.0)
