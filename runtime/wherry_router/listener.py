"""TLS on the router's listener, from files that are followed as they change."""

import argparse
import ssl
from pathlib import Path

from wherry_protocol.http.tls import Exchangeable, TlsError, load_context
from wherry_protocol.watched import Watched, read


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of this module."""
    parser.add_argument(
        "--tls-cert", type=Path, help="certificate chain (PEM): listen with TLS; followed as it changes"
    )
    parser.add_argument("--tls-key", type=Path, help="its key (PEM, not encrypted); needed with --tls-cert")


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where flags do not fit together."""
    if bool(args.tls_cert) != bool(args.tls_key):
        parser.error("--tls-cert and --tls-key go together")


class TlsFiles:
    """A certificate and its key on disk.

    Raises:
        TlsError: they cannot be used at the start.
    """

    def __init__(self, cert: Path, key: Path) -> None:
        self._cert, self._key = cert, key
        self._exchangeable: Exchangeable | None = None
        self.not_after = 0.0  # Unix seconds
        self.watched = Watched("TLS certificate", [cert, key], self._load, self._use, (TlsError,))
        self.watched.start()
        if self._exchangeable is None:
            raise TlsError(self.watched.problem or f"{cert} and {key} are being written")
        self.context: ssl.SSLContext = self._exchangeable.context

    def stale(self) -> dict[str, bool]:
        """Whether the files are other than what is in use, since they cannot be used."""
        return {"tls": self.watched.problem is not None}

    def _load(self) -> tuple[ssl.SSLContext, float]:
        context = load_context(self._cert, self._key)
        return context, _not_after(read(self._cert))

    def _use(self, loaded: tuple[ssl.SSLContext, float]) -> None:
        context, self.not_after = loaded
        if self._exchangeable is None:
            self._exchangeable = Exchangeable(context)
        else:
            self._exchangeable.use(context)


def _not_after(pem: bytes) -> float:
    from cryptography import x509

    return x509.load_pem_x509_certificates(pem)[0].not_valid_after_utc.timestamp()


def make_tls(args: argparse.Namespace) -> TlsFiles | None:
    """What the flags ask for.

    Raises:
        TlsError: the files cannot be used.
    """
    return TlsFiles(args.tls_cert, args.tls_key) if args.tls_cert else None
