"""Mutual TLS between routers and workers, from one Secret: `ca.crt`, `tls.crt` and `tls.key`.

Both ends show `tls.crt`, and each wants the other's to be signed by `ca.crt`. Workers come and go with other addresses,
so a worker's certificate has one fixed name, and that is what the router looks for.

TLS 1.3 only, and no session is ever resumed: a resumed one is not checked against the authorities of today, and before
1.3 Python cannot turn that off.
"""

import logging
import os
import ssl
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NamedTuple

from wherry_protocol.http.tls import Exchangeable, TlsError
from wherry_protocol.watched import Watched, read

log = logging.getLogger("wherry.tls")

SAID_AGAIN_S = 60.0
_MAX_REASONS = 20
CA, CERT, KEY = "ca.crt", "tls.crt", "tls.key"
ENTRIES = (CA, CERT, KEY)


class _Refusals:
    """Says why clients are refused; the same once in a while, as whoever reaches the port can be refused."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said: dict[str, float] = {}

    def note(self, why: str) -> None:
        now = self._clock()
        self._said = {text: when for text, when in self._said.items() if now - when < SAID_AGAIN_S}
        if why not in self._said and len(self._said) < _MAX_REASONS:
            self._said[why] = now
            log.warning("client refused", extra={"fields": {"why": why}})


_refusals = _Refusals()


class _Telling(ssl.SSLObject):
    """The server's side of a connection. Event loops keep to themselves why a handshake failed."""

    def do_handshake(self) -> None:
        try:
            super().do_handshake()
        except (ssl.SSLWantReadError, ssl.SSLWantWriteError):
            raise
        except ssl.SSLCertVerificationError as error:
            _refusals.note(f"its certificate is not accepted: {error.verify_message}")
            raise
        except ssl.SSLError as error:
            _refusals.note(f"the handshake failed: {error.reason or type(error).__name__}")
            raise


class Ends(NamedTuple):
    """A context for each end, and when the certificate ends (Unix seconds)."""

    worker: ssl.SSLContext
    router: ssl.SSLContext
    not_after: float


def _strict(context: ssl.SSLContext) -> ssl.SSLContext:
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    # The authority of a namespace is often signed by another one, which nobody here has to know.
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.set_alpn_protocols(["http/1.1"])
    return context


def worker_context() -> ssl.SSLContext:
    """A worker's context without a certificate: it lets nobody in whom it cannot check."""
    context = _strict(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    context.num_tickets = 0
    return context


def listener_context() -> ssl.SSLContext:
    """The same, which tells in the log of clients that it refuses."""
    context = worker_context()
    context.sslobject_class = _Telling
    return context


def _router_context() -> ssl.SSLContext:
    context = _strict(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    context.hostname_checks_common_name = False
    return context


def ends_of(entries: Mapping[str, bytes], name: str) -> Ends:
    """Both ends from what the Secret holds, by entry; workers are called `name`. No key is written to a disk.

    Raises:
        TlsError: the entries cannot be used together; the message says which and why, and nothing of the key.
    """
    ends = worker_context(), _router_context()
    with _as_files(entries) as paths:
        for context in ends:
            try:
                # An encrypted key would ask on the terminal for its password.
                context.load_cert_chain(paths[CERT], paths[KEY], password=_no_password)
            except ssl.SSLError as error:
                raise TlsError(f"{CERT} and {KEY}: {error.reason or 'not PEM, or not a pair'}") from None
            try:
                context.load_verify_locations(cadata=entries[CA].decode("ascii"))
            except (ssl.SSLError, ValueError) as error:
                raise TlsError(f"{CA}: {getattr(error, 'reason', None) or 'not PEM'}") from None
    return Ends(*ends, _shake_hands(*ends, name))


@contextmanager
def _as_files(entries: Mapping[str, bytes]) -> Iterator[dict[str, str]]:
    """Paths to the pair, as long as it is asked for: ssl reads certificates and keys from files only."""
    with ExitStack() as stack:
        paths = {}
        for entry in (CERT, KEY):
            file = stack.enter_context(os.fdopen(os.memfd_create(entry), "wb"))
            file.write(entries[entry])
            file.flush()
            paths[entry] = f"/proc/self/fd/{file.fileno()}"
        yield paths


def _no_password() -> str:
    raise TlsError(f"{KEY} is encrypted; give one that is not")


def _shake_hands(worker: ssl.SSLContext, router: ssl.SSLContext, name: str) -> float:
    """Tries the two ends on one another, as they will meet. Returns when the certificate ends.

    Raises:
        TlsError: they refuse one another.
    """
    up, down = ssl.MemoryBIO(), ssl.MemoryBIO()
    near = router.wrap_bio(down, up, server_hostname=name)
    far = worker.wrap_bio(up, down, server_side=True)
    for end, role in ((near, "worker"), (far, "router")) * 4:
        try:
            end.do_handshake()
        except ssl.SSLWantReadError:
            continue
        except ssl.SSLCertVerificationError as error:
            raise TlsError(f"{CERT} cannot be a {role}'s certificate by {CA}: {error.verify_message}") from None
        except ssl.SSLError as error:
            raise TlsError(f"{CERT} cannot be a {role}'s certificate: {error.reason or error}") from None
    return float(ssl.cert_time_to_seconds(str((near.getpeercert() or {})["notAfter"])))


class MutualTls:
    """The files in `directory`, followed as they change. `watched.run()` does the following.

    Raises:
        TlsError: they cannot be used at the start.
    """

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        self._directory = directory
        self._ends: Ends | None = None
        self._listener: Exchangeable | None = None
        paths = [directory / entry for entry in ENTRIES]
        self.watched = Watched("certificate between routers and workers", paths, self._load, self._use, (TlsError,))
        self.watched.start()
        if self._ends is None:
            raise TlsError(self.watched.problem or f"the files in {directory} are being written")
        self._listener = Exchangeable(self._ends.worker, listener_context)

    @property
    def listener(self) -> ssl.SSLContext:
        """What a worker listens with: always the same object, with the certificate of today at each handshake."""
        if self._listener is None:
            raise TlsError("not loaded")
        return self._listener.context

    @property
    def client(self) -> ssl.SSLContext:
        """What a router connects with: another object after each change, so that pools keyed by it start anew."""
        if self._ends is None:
            raise TlsError("not loaded")
        return self._ends.router

    @property
    def not_after(self) -> float:
        """When the certificate in use ends, in Unix seconds."""
        return 0.0 if self._ends is None else self._ends.not_after

    @property
    def stale(self) -> bool:
        """Whether the files are other than what is in use, since they cannot be used."""
        return self.watched.problem is not None

    def _load(self) -> Ends:
        entries = {entry: read(self._directory / entry) for entry in ENTRIES}
        try:
            return ends_of(entries, self.name)
        except TlsError as error:
            raise TlsError(f"{self._directory}: {error}") from None

    def _use(self, ends: Ends) -> None:
        self._ends = ends
        if self._listener is not None:
            self._listener.use(ends.worker)
