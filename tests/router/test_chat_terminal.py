"""`wherry chat` in a real terminal: a pseudo-terminal that a person's keys go into."""

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest
from tests.router.harness import Process


class Terminal:
    """A program on a pseudo-terminal."""

    def __init__(self, *command: str) -> None:
        ours, theirs = pty.openpty()
        env = os.environ | {"TERM": "dumb", "COLUMNS": "100"}
        self.process = subprocess.Popen(
            command, stdin=theirs, stdout=theirs, stderr=theirs, env=env, start_new_session=True
        )
        os.close(theirs)
        os.set_blocking(ours, False)
        self._fd = ours
        self.shown = ""

    def expect(self, text: str, timeout_s: float = 60) -> str:
        """What was shown up to and with `text`, which is then forgotten."""
        deadline = time.monotonic() + timeout_s
        while text not in self.shown:
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {timeout_s:g} s for {text!r}; shown: {self.shown!r}")
            try:
                self.shown += os.read(self._fd, 4096).decode(errors="replace")
            except BlockingIOError:
                time.sleep(0.02)
            except OSError:  # the program ended and closed the terminal
                raise AssertionError(f"ended before {text!r}; shown: {self.shown!r}") from None
        before, _, self.shown = self.shown.partition(text)
        return before + text

    def type(self, line: str) -> None:
        os.write(self._fd, line.encode() + b"\r")

    def close(self) -> None:
        self.process.kill()
        self.process.wait(timeout=10)
        os.close(self._fd)


@pytest.fixture
def chat(tiny_serve: Process) -> Iterator[Terminal]:
    command = [sys.executable, "-m", "wherry_cli.main", "chat", "--url", tiny_serve.url, "--temperature", "0"]
    terminal = Terminal(*command)
    yield terminal
    terminal.close()


PROMPT = "you>"


def test_two_questions_a_reset_and_exit(chat: Terminal) -> None:
    chat.expect(PROMPT)
    chat.type("What does git commit do?")
    first = chat.expect(PROMPT)
    assert len(first) > len("What does git commit do?\r\n") + 5
    chat.type("/reset")
    chat.expect(PROMPT)
    chat.type("What does git commit do?")
    assert chat.expect(PROMPT).split() == first.split(), "after a reset the answer is the first one's"
    chat.type("/exit")
    assert chat.process.wait(timeout=30) == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(chat: Terminal) -> None:
    chat.expect(PROMPT)
    chat.type("Tell me everything about the kernel and its drivers, one by one.")
    chat.expect("\n")
    os.killpg(chat.process.pid, signal.SIGINT)
    chat.expect(PROMPT)
    assert chat.process.poll() is None
    chat.type("/exit")
    assert chat.process.wait(timeout=30) == 0
