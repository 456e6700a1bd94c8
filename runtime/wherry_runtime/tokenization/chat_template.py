"""The checkpoint's chat template, rendered with bounds on time, memory and output."""

import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from wherry_protocol.worker import ChatMessage
from wherry_runtime.loading.errors import ModelError

TIME_LIMIT_S = 5.0  # a whole template renders in under a millisecond; starting the process takes some 100
OUTPUT_LIMIT = 4 << 20  # characters
SOURCE_LIMIT = 1 << 20


class TemplateError(Exception):
    """The template made no prompt of the messages. `refused`: it said why itself, so the messages are at fault."""

    def __init__(self, message: str, *, refused: bool = False) -> None:
        super().__init__(message)
        self.refused = refused


def find_template(directory: Path, settings: dict[str, Any]) -> str | None:
    """The template's source: `chat_template.jinja`, else `chat_template` (or its `default`) of tokenizer_config.json.

    Raises:
        ModelError: bad_chat_template, when it cannot be read.
    """
    path = directory / "chat_template.jinja"
    try:
        source = path.read_text(encoding="utf-8") if path.is_file() else settings.get("chat_template")
    except (OSError, UnicodeDecodeError) as e:
        raise ModelError("bad_chat_template", f"{path}: {e}") from e
    if isinstance(source, list):
        named = {t.get("name"): t.get("template") for t in source if isinstance(t, dict)}
        source = named.get("default")
    if source is None:
        return None
    if not isinstance(source, str) or len(source) > SOURCE_LIMIT:
        raise ModelError("bad_chat_template", f"{directory}: the chat template is not text of at most 1 MiB")
    return source


class ChatTemplate:
    """Renders in a helper process (see `template_worker`), which is killed and started anew when it overruns."""

    def __init__(
        self,
        source: str,
        variables: dict[str, Any],
        *,
        time_limit_s: float = TIME_LIMIT_S,
        output_limit: int = OUTPUT_LIMIT,
    ) -> None:
        """`variables` are passed to every rendering: bos_token, eos_token."""
        self._source = source
        self._variables = variables
        self._time_limit_s = time_limit_s
        self._output_limit = output_limit
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def render(self, messages: list[ChatMessage], now: int = 0) -> str:
        """The prompt for an answer to `messages`. Blocks for at most the time limit; safe from any thread.

        Args:
            now: what a template that writes a date takes for the time, in Unix seconds; 0: the time it is.

        Raises:
            TemplateError: it is broken, refused the messages, or passed a limit.
        """
        turns = [{"role": m.role, "content": m.content} | ({"name": m.name} if m.name else {}) for m in messages]
        variables = {**self._variables, "messages": turns, "add_generation_prompt": True}
        line = json.dumps({"variables": variables, "limit": self._output_limit, "now": now}).encode() + b"\n"
        with self._lock:
            reply = self._ask(line)
        if "text" in reply:
            return str(reply["text"])
        refused = reply.get("error") == "refused"
        why = "refused the messages" if refused else "failed"
        raise TemplateError(f"the chat template {why}: {reply.get('message')}", refused=refused)

    def close(self) -> None:
        """Ends the helper process."""
        with self._lock:
            self._stop()

    def _ask(self, line: bytes) -> dict[str, Any]:
        deadline = time.monotonic() + self._time_limit_s
        process = self._process
        if process is None or process.poll() is not None:
            self._stop()
            process = self._process = self._start()
            line = json.dumps(self._source).encode() + b"\n" + line
        try:
            answer = _exchange(process, line, deadline, 8 * self._output_limit + 4096)
        except TimeoutError:
            self._stop()
            raise TemplateError(f"the chat template ran for more than {self._time_limit_s:g} s") from None
        except (OSError, ValueError) as e:
            self._stop()
            raise TemplateError(f"the chat template's process ended ({e})") from e
        reply = json.loads(answer)
        return reply if isinstance(reply, dict) else {}

    def _start(self) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "wherry_runtime.tokenization.template_worker"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            # No secrets for a template, even one that leaves its sandbox.
            env={k: v for k, v in os.environ.items() if k in ("PATH", "PYTHONPATH", "LANG", "LC_ALL", "TZ", "HOME")},
        )
        if process.stdin is None or process.stdout is None:
            raise OSError("no pipes")
        os.set_blocking(process.stdin.fileno(), False)
        os.set_blocking(process.stdout.fileno(), False)
        return process

    def _stop(self) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()


def _exchange(process: subprocess.Popen[bytes], line: bytes, deadline: float, limit: int) -> bytes:
    """Writes `line`, reads a line.

    Raises:
        TimeoutError, OSError, ValueError: too late, the process ended, or its answer is too long.
    """
    if process.stdin is None or process.stdout is None:
        raise OSError("no pipes")
    unsent = memoryview(line)
    answer = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdin, selectors.EVENT_WRITE)
        selector.register(process.stdout, selectors.EVENT_READ)
        while not answer.endswith(b"\n"):
            left = deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    unsent = unsent[os.write(process.stdin.fileno(), unsent[:65536]) :]
                    if not unsent:
                        selector.unregister(process.stdin)
                elif chunk := os.read(process.stdout.fileno(), 1 << 16):
                    answer += chunk
                else:
                    raise OSError("it closed its output")
                if len(answer) > limit:
                    raise ValueError("its answer is too long")
    return bytes(answer)
