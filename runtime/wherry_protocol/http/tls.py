"""A TLS listener whose certificate can be exchanged: connections keep the one that they began with."""

import ssl
from collections.abc import Callable
from pathlib import Path


class TlsError(Exception):
    """Certificate and key cannot be used. The message says why, and nothing of the key."""


def server_context() -> ssl.SSLContext:
    """A listener's context for HTTP/1.1, without a certificate."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    return context


def load_context(cert: Path, key: Path) -> ssl.SSLContext:
    """A server's context with the certificate chain in `cert` and its key, both PEM.

    Raises:
        TlsError: they cannot be read, or do not belong together.
    """
    context = server_context()
    try:
        # An encrypted key would ask on the terminal for its password.
        context.load_cert_chain(cert, key, password=_no_password)
    except ssl.SSLError as error:
        raise TlsError(f"{cert} and {key}: {error.reason or 'not PEM, or not a pair'}") from None
    except OSError as error:
        raise TlsError(f"{error.filename or f'{cert} or {key}'}: {error.strerror}") from None
    return context


def _no_password() -> str:
    raise TlsError("the TLS key is encrypted; give one that is not")


class Exchangeable:
    """What a server listens with. `use` gives it another certificate, for every handshake from then on.

    The certificate is chosen at each handshake, not loaded into the listener's context: chain and key could not be
    exchanged there in one step, and a handshake in between would get one of each. With it come the authorities that
    clients are checked against; whether they are checked, and which versions are spoken, is what `make` says.
    """

    def __init__(self, current: ssl.SSLContext, make: Callable[[], ssl.SSLContext] = server_context) -> None:
        self._current = current
        self.context = make()
        self.context.sni_callback = self._choose

    def use(self, context: ssl.SSLContext) -> None:
        """From the next handshake on."""
        self._current = context

    def _choose(self, connection: ssl.SSLObject | ssl.SSLSocket, _name: str | None, _own: ssl.SSLContext) -> None:
        # Called for clients that name no server, too.
        connection.context = self._current
