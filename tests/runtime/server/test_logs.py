"""Log lines as programs and as people read them."""

import json
import os
import pty
import subprocess
import sys

PROGRAM = """
import logging
from wherry_protocol.http.logs import set_up
set_up(for_people={people})
log = logging.getLogger("wherry.test")
log.warning("trying again in %.1f s", 0.5, extra={{"fields": {{"status": 503, "host": "hub"}}}})
try:
    1 / 0
except ZeroDivisionError:
    log.exception("it broke")
"""


def lines(people: bool, stderr: int) -> None:
    command = [sys.executable, "-c", PROGRAM.format(people=people)]
    assert subprocess.run(command, stderr=stderr, check=False).returncode == 0


def on_a_terminal(people: bool) -> list[str]:
    ours, theirs = pty.openpty()
    try:
        lines(people, theirs)
        os.close(theirs)
        found = b""
        while True:
            try:
                found += os.read(ours, 65536)
            except OSError:  # nobody has the other end any more
                return found.decode().splitlines()
    finally:
        os.close(ours)


def in_a_pipe(people: bool) -> list[str]:
    ours, theirs = os.pipe()
    lines(people, theirs)
    os.close(theirs)
    with open(ours) as file:
        return file.read().splitlines()


def test_a_terminal_shows_text_to_people() -> None:
    first, second, *rest = on_a_terminal(people=True)
    assert first == "warning: trying again in 0.5 s (status: 503, host: hub)"
    assert second == "error: it broke"
    assert rest[0] == "Traceback (most recent call last):"
    assert rest[-1] == "ZeroDivisionError: division by zero"


def test_everything_else_gets_json() -> None:
    for found in (in_a_pipe(people=True), in_a_pipe(people=False), on_a_terminal(people=False)):
        first, second = map(json.loads, found)
        assert (first["level"], first["message"]) == ("warning", "trying again in 0.5 s")
        assert (first["status"], first["host"], first["logger"]) == (503, "hub", "wherry.test")
        assert second["exception"].endswith("ZeroDivisionError: division by zero")
