"""Mutual TLS to workers: what connections are made with, and what is said where one is refused."""

import argparse
import logging
import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypedDict

import aiohttp

from wherry_protocol.http.mutual_tls import MutualTls
from wherry_router.pool import Endpoint

log = logging.getLogger("wherry.router")

_AGAIN_S = 60.0
_MAX_NOTES = 1000


class Secure(TypedDict, total=False):
    """Arguments of a request: the context, and the name that the worker's certificate must have."""

    ssl: ssl.SSLContext
    server_hostname: str


PLAIN = Secure()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of this module."""
    parser.add_argument(
        "--worker-tls",
        type=Path,
        help="directory with ca.crt, tls.crt and tls.key: speak mutual TLS to workers, and nothing else; "
        "followed as it changes",
    )
    parser.add_argument(
        "--worker-tls-name", help="the DNS name that workers' certificates must have; needed with --worker-tls"
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where flags do not fit together."""
    if bool(args.worker_tls) != bool(args.worker_tls_name):
        parser.error("--worker-tls and --worker-tls-name go together")
    endpoints: list[Endpoint] = args.endpoints or []
    secure = {endpoint.url.startswith("https://") for endpoint in endpoints}
    if args.worker_tls and False in secure:
        parser.error("with --worker-tls every one of --endpoints begins with https://")
    if not args.worker_tls and True in secure:
        parser.error("--endpoints with https:// need --worker-tls")


class WorkerTls:
    """The router's end of mutual TLS.

    Raises:
        TlsError: the files in `directory` cannot be used at the start.
    """

    def __init__(self, directory: Path, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.files = MutualTls(directory, name)
        self._clock = clock
        self._notes: dict[str, tuple[str, float]] = {}

    def secure(self) -> Secure:
        """What the next connection is made with. The context is another object after each change of the files."""
        return Secure(ssl=self.files.client, server_hostname=self.files.name)

    def stale(self) -> dict[str, bool]:
        """Whether the files are other than what is in use, since they cannot be used."""
        return {"worker_tls": self.files.stale}

    def note(self, url: str, error: BaseException) -> None:
        """Says why a worker was refused, or refused the router; the same once a minute at most."""
        why = reason(error)
        now = self._clock()
        said, when = self._notes.get(url, ("", 0.0))
        if not why or (why == said and now - when < _AGAIN_S):
            return
        if len(self._notes) >= _MAX_NOTES:
            self._notes.clear()
        self._notes[url] = why, now
        log.warning("no TLS with a worker", extra={"fields": {"worker": url, "why": why}})


def reason(error: BaseException | None) -> str:
    """What TLS has to say of an error; empty where the error is none of TLS.

    A worker that does not accept the router's certificate only ends the connection.
    """
    ended = isinstance(error, aiohttp.ClientConnectionError | ConnectionError)
    if ended and not isinstance(error, aiohttp.ClientConnectorError | TimeoutError):
        return "the worker ended the connection without an answer; its log says whether it refused the certificate"
    seen = 0
    while error is not None and seen < 5:
        inner = getattr(error, "certificate_error", None) or getattr(error, "os_error", None)
        for one in (inner, error):
            if isinstance(one, ssl.SSLCertVerificationError):
                return f"the worker's certificate is not accepted: {one.verify_message}"
            if isinstance(one, ssl.SSLError):
                return f"the handshake failed: {one.reason or one}"
        error, seen = error.__cause__ or error.__context__, seen + 1
    return ""


def make_worker_tls(args: argparse.Namespace) -> WorkerTls | None:
    """What the flags ask for.

    Raises:
        TlsError: the files cannot be used.
    """
    return WorkerTls(args.worker_tls, args.worker_tls_name) if args.worker_tls else None
