"""Logs as one JSON object a line on stderr."""

import asyncio
import atexit
import functools
import logging
import sys
import time
from typing import Any

import msgspec

_encoder = msgspec.json.Encoder(enc_hook=str)


class JsonFormatter(logging.Formatter):
    """`log.info("message", extra={"fields": {…}})` becomes {"time", "level", "message", …fields}."""

    def format(self, record: logging.LogRecord) -> str:
        """One line of JSON."""
        line = _head(record.created, record.levelname.lower(), record.name, record.getMessage())
        line.update(getattr(record, "fields", {}))
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _encoder.encode(line).decode()


class TextFormatter(logging.Formatter):
    """The same for people: `warning: message (key: value, …)`, with the traceback of an error below."""

    def format(self, record: logging.LogRecord) -> str:
        """One line, or more where the message has them."""
        fields = ", ".join(f"{key}: {value}" for key, value in getattr(record, "fields", {}).items())
        line = f"{record.levelname.lower()}: {record.getMessage()}{f' ({fields})' if fields else ''}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class Lines:
    """Lines of which there are thousands a second: made without a `LogRecord`, and written together, `LATE_S` later at
    most. All have one level (info), logger and message. Called within an event loop."""

    LATE_S = 0.2

    def __init__(self, logger: str, message: str) -> None:
        self._logger = logger
        self._message = message
        self._lines: list[bytes] = []
        atexit.register(self.flush)

    def __call__(self, **fields: object) -> None:
        """One line."""
        line = _head(time.time(), "info", self._logger, self._message)
        if not self._lines:
            asyncio.get_running_loop().call_later(self.LATE_S, self.flush)
        self._lines.append(_encoder.encode(line | fields))

    def flush(self) -> None:
        """Writes what there is."""
        if self._lines:
            self._lines.append(b"")
            sys.stderr.buffer.write(b"\n".join(self._lines))
            sys.stderr.buffer.flush()
            self._lines.clear()


def _head(when: float, level: str, logger: str, message: str) -> dict[str, Any]:
    moment = f"{_second(int(when))}.{int(when * 1000) % 1000:03d}Z"
    return {"time": moment, "level": level, "logger": logger, "message": message}


@functools.lru_cache(maxsize=4)
def _second(now: int) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now))


def set_up(level: int = logging.INFO, *, for_people: bool = False) -> None:
    """Sends every log line of this process to stderr as JSON.

    Args:
        for_people: as text instead, where stderr is a terminal.
    """
    # What no line says is not gathered: https://docs.python.org/3/howto/logging.html#optimization
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    logging._srcfile = None
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(TextFormatter() if for_people and sys.stderr.isatty() else JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("asyncio").setLevel(logging.WARNING)
