"""A real Redis on a socket of its own, or behind TLS and a password."""

import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

import redis
from tests.reliability.world import free_port
from tests.router.certificates import Pair
from tests.router.harness import eventually


class Server:
    """`redis-server` or `valkey-server`; without either the test fails: what it checks is nowhere else."""

    def __init__(self, tls: Pair | None = None, password: str = "") -> None:
        """`tls`: a certificate for 127.0.0.1 that signs itself, for a port with TLS and nothing else."""
        binary = shutil.which("redis-server") or shutil.which("valkey-server")
        if binary is None:
            raise AssertionError("redis-server or valkey-server must be installed (`make setup` does it on Debian)")
        self._binary = binary
        self._dir = Path(tempfile.mkdtemp(prefix="wherry-redis-"))
        self.url = f"unix://{self._dir}/redis.sock"
        self._flags = ["--port", "0", "--unixsocket", f"{self._dir}/redis.sock"]
        if tls is not None:
            port, cert, key = free_port(), self._dir / "tls.crt", self._dir / "tls.key"
            cert.write_text(tls.cert)
            key.write_text(tls.key)
            self.url = f"rediss://:{password}@127.0.0.1:{port}/0?ssl_ca_certs={cert}"
            files = ["--tls-cert-file", str(cert), "--tls-key-file", str(key), "--tls-ca-cert-file", str(cert)]
            self._flags = ["--port", "0", "--tls-port", str(port), "--tls-auth-clients", "no", *files]
        if password:
            self._flags += ["--requirepass", password]
        self.client = redis.Redis.from_url(self.url, socket_timeout=5)
        self.start()

    def start(self) -> None:
        self._log = (self._dir / "log").open("ab")
        self.process = subprocess.Popen(
            [self._binary, *self._flags, "--save", "", "--dir", str(self._dir)],
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
