"""A real Redis on a socket of its own."""

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import redis
from tests.router.harness import eventually


class Server:
    """`redis-server` or `valkey-server`; without either the test fails: what it checks is nowhere else."""

    def __init__(self) -> None:
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            raise AssertionError("redis-server or valkey-server must be installed (`make setup` does it on Debian)")
        self._binary = binary
        self._dir = Path(tempfile.mkdtemp(prefix="wherry-redis-"))
        self.url = f"unix://{self._dir}/redis.sock"
        self.client = redis.Redis.from_url(self.url, socket_timeout=5)
        self.start()

    def start(self) -> None:
        self._log = (self._dir / "log").open("ab")
        self.process = subprocess.Popen(
            [
                self._binary,
                "--port",
                "0",
                "--unixsocket",
                f"{self._dir}/redis.sock",
                "--save",
                "",
                "--dir",
                str(self._dir),
            ],
            stdout=self._log,
            stderr=self._log,
            stdin=subprocess.DEVNULL,
        )
        eventually(self._answers)

    def _answers(self) -> bool:
        try:
            return bool(self.client.ping())
        except (redis.RedisError, OSError):
            return False

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(10)
        self._log.close()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.kill()
        self.client.close()
        shutil.rmtree(self._dir, ignore_errors=True)
