"""Certificates that last for a day."""

import datetime
import ipaddress
import random
from typing import NamedTuple

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

WORKERS = "chat-workers.default.svc"
BOTH = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)


class Pair(NamedTuple):
    """PEM texts; `serial` tells certificates apart."""

    cert: str
    key: str
    serial: int
    not_after: float


def _builder(common_name: str, key: ec.EllipticCurvePrivateKey, ends_in: datetime.timedelta) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, common_name)]))
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + ends_in)
    )


def _pair(cert: x509.Certificate, key: ec.EllipticCurvePrivateKey, password: bytes = b"") -> Pair:
    how = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    text = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how)
    pem = cert.public_bytes(serialization.Encoding.PEM)
    return Pair(pem.decode(), text.decode(), cert.serial_number, cert.not_valid_after_utc.timestamp())


def pair(password: bytes = b"") -> Pair:
    """A certificate for 127.0.0.1 and localhost that signs itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    names = [x509.IPAddress(ipaddress.ip_address("127.0.0.1")), x509.DNSName("localhost")]
    builder = _builder("localhost", key, datetime.timedelta(days=1))
    cert = (
        builder.issuer_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")]))
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    return _pair(cert, key, password)


class Authority:
    """Signs certificates; as one that is signed by `parent`, or by itself."""

    def __init__(self, name: str = "authority", parent: "Authority | None" = None) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        builder = _builder(name, self._key, datetime.timedelta(days=2)).add_extension(
            x509.BasicConstraints(ca=True, path_length=None), critical=True
        )
        signer = parent or self
        self._cert = builder.issuer_name(signer._name).sign(signer._key, hashes.SHA256())
        self.cert = self._cert.public_bytes(serialization.Encoding.PEM).decode()

    def issue(
        self,
        *names: str,
        usages: tuple[x509.ObjectIdentifier, ...] = BOTH,
        ends_in: datetime.timedelta | None = None,
        password: bytes = b"",
    ) -> Pair:
        """A certificate for the DNS names `names`; without any, the name is in its subject only."""
        key = ec.generate_private_key(ec.SECP256R1())
        # Another end for each, so that metrics tell them apart too.
        ends_in = ends_in or datetime.timedelta(days=1, seconds=random.randrange(3600))
        builder = _builder(WORKERS, key, ends_in).issuer_name(self._name)
        builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        if names:
            found = x509.SubjectAlternativeName([x509.DNSName(name) for name in names])
            builder = builder.add_extension(found, critical=False)
        if usages:
            builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
        return _pair(builder.sign(self._key, hashes.SHA256()), key, password)

    def secret(self, *names: str, ca: str = "", **how: object) -> dict[str, str]:
        """What a Secret holds, with a new certificate; `ca`: instead of this authority's own."""
        issued = self.issue(*(names or (WORKERS,)), **how)  # type: ignore[arg-type]
        return {"ca.crt": ca or self.cert, "tls.crt": issued.cert, "tls.key": issued.key}
