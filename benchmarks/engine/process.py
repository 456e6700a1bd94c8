"""A process with one engine and one format of weights: it measures what it is asked and stands still in between."""

import json
import signal
import socket
import subprocess
import tempfile
from dataclasses import asdict
from typing import Any, Self

from benchmarks.engine import models, peers, variants
from benchmarks.engine.workload import Job

LIMIT_S = 600  # for one answer


class EngineFailed(Exception):
    """An engine ended, or did not answer in time. Says what it wrote last."""


class EngineProcess:
    """Loads the job's weights and stays. Between two questions all its threads are stopped, so that many engines can be
    resident and none of them takes from the one that is measured more than the memory it lies in.

    Args:
        stops: whether it is stopped; processes that watch one another must not be.

    Raises:
        EngineFailed: it could not load.
    """

    def __init__(self, job: Job, *, stops: bool = True) -> None:
        self._stops = stops
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close())
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(LIMIT_S)
        self._lines = self._socket.makefile("rw")
        command = [str(peers.python(job.engine)), "-m", f"benchmarks.engine.{job.engine}", str(theirs.fileno())]
        with theirs:
            self._process = subprocess.Popen(
                command,
                cwd=models.ROOT,
                env=variants.environment(huge_pages=job.options.get("huge_pages", True)),
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._log,
                stderr=self._log,
            )
        try:
            self.loaded = self._exchange(asdict(job))  # load_s, settings, memory
        except EngineFailed:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def ask(self, **question: Any) -> dict[str, Any]:
        """What workload.measure() or score() gives, and `memory`.

        Raises:
            EngineFailed: no answer.
        """
        self._process.send_signal(signal.SIGCONT)
        return self._exchange(question)

    def _exchange(self, message: dict[str, Any]) -> dict[str, Any]:
        try:
            print(json.dumps(message), file=self._lines, flush=True)
            answer = self._lines.readline()
        except OSError as error:  # a limit passed, or a broken pipe
            raise EngineFailed(f"{error}: {self._last_words()}") from error
        if not answer:
            raise EngineFailed(f"ended with exit code {self._process.wait()}: {self._last_words()}")
        if self._stops:
            self._process.send_signal(signal.SIGSTOP)
        return dict(json.loads(answer))

    def _last_words(self) -> str:
        self._log.seek(0)
        return self._log.read()[-2000:].strip()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._socket.close()
        self._log.close()
