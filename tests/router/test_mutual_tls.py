"""Which Secrets both ends of mutual TLS take, and what is said of the others."""

import re
import shutil
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import pytest
import yaml
from cryptography.x509.oid import ExtendedKeyUsageOID
from tests.router.certificates import WORKERS, Authority, pair
from tests.router.harness import ROOT
from tests.router.volume import Volume

from wherry_protocol.http.mutual_tls import MutualTls, ends_of
from wherry_protocol.http.tls import TlsError

OURS, OTHER = Authority(), Authority("other")
BETWEEN = Authority("between", parent=OURS)
SERVER, CLIENT = (ExtendedKeyUsageOID.SERVER_AUTH,), (ExtendedKeyUsageOID.CLIENT_AUTH,)


def chained() -> dict[str, str]:
    found = BETWEEN.secret(ca=OURS.cert)
    return found | {"tls.crt": found["tls.crt"] + BETWEEN.cert}


def own() -> dict[str, str]:
    """Signed by nobody else: it is its own authority."""
    found = pair()
    return {"ca.crt": found.cert, "tls.crt": found.cert, "tls.key": found.key}


USABLE: dict[str, Callable[[], dict[str, str]]] = {
    "as cert-manager makes it": OURS.secret,
    "one name of several": lambda: OURS.secret("other.example", WORKERS),
    "no usages named": lambda: OURS.secret(usages=()),
    "two authorities, while one is exchanged": lambda: OURS.secret(ca=OTHER.cert + OURS.cert),
    "a chain": chained,
    "an authority that another one signed": BETWEEN.secret,
}
REFUSED: dict[str, tuple[Callable[[], dict[str, str]], str]] = {
    "of another authority": (lambda: OTHER.secret(ca=OURS.cert), "ca.crt: unable to get local issuer certificate"),
    "for another name": (lambda: OURS.secret("else-workers.default.svc"), f"not valid for '{WORKERS}'"),
    "the name is in its subject only": (
        lambda: dict(zip(("ca.crt", "tls.crt", "tls.key"), (OURS.cert, *OURS.issue()[:2]), strict=True)),
        f"not valid for '{WORKERS}'",
    ),
    "for workers only": (lambda: OURS.secret(usages=SERVER), "cannot be a router's certificate"),
    "for routers only": (lambda: OURS.secret(usages=CLIENT), "cannot be a worker's certificate"),
    "its time is over": (lambda: OURS.secret(ends_in=timedelta(minutes=-1)), "certificate has expired"),
    "a pair that is none": (lambda: OURS.secret() | {"tls.key": pair().key}, "MISMATCH"),
    "an encrypted key": (lambda: OURS.secret(password=b"secret"), "encrypted"),
    "no PEM": (lambda: OURS.secret() | {"tls.crt": "hello"}, "tls.crt and tls.key"),
    "no PEM of an authority": (lambda: OURS.secret() | {"ca.crt": "hello"}, "ca.crt"),
    "an empty authority": (lambda: OURS.secret() | {"ca.crt": ""}, "ca.crt"),
    "no text at all": (lambda: OURS.secret() | {"ca.crt": "\u00e9"}, "ca.crt"),
}


def encoded(entries: dict[str, str]) -> dict[str, bytes]:
    return {entry: text.encode() for entry, text in entries.items()}


@pytest.mark.parametrize("make", USABLE.values(), ids=USABLE)
def test_secrets_that_can_be_used(make: Callable[[], dict[str, str]]) -> None:
    assert ends_of(encoded(make()), WORKERS).not_after > 0


def test_a_certificate_may_be_its_own_authority() -> None:
    assert ends_of(encoded(own()), "localhost").not_after > 0


@pytest.mark.parametrize("make, why", REFUSED.values(), ids=REFUSED)
def test_secrets_that_cannot_be_used(make: Callable[[], dict[str, str]], why: str) -> None:
    secret = make()
    with pytest.raises(TlsError, match=why.replace("(", r"\(")) as caught:
        ends_of(encoded(secret), WORKERS)
    assert "PRIVATE" not in str(caught.value)
    assert caught.value.__cause__ is None


def test_files_are_followed_and_what_cannot_be_used_changes_nothing(tmp_path: Path) -> None:
    volume = Volume(tmp_path / "tls", **OURS.secret())
    found = MutualTls(volume.path, WORKERS)
    first, listener = found.client, found.listener
    volume.put(**OTHER.secret(ca=OURS.cert))
    for _ in range(2):
        found.watched.look()
    assert found.stale
    assert str(volume.path) in str(found.watched.problem)
    assert (found.client, found.listener) == (first, listener)
    volume.put(**OTHER.secret())
    for _ in range(2):
        found.watched.look()
    assert not found.stale
    assert found.client is not first
    assert found.listener is listener


@pytest.mark.parametrize("lacking", ["ca.crt", "tls.crt", "tls.key"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, lacking: str) -> None:
    for name, text in OURS.secret().items():
        if name != lacking:
            (tmp_path / name).write_text(text)
    with pytest.raises(TlsError, match=f"{lacking}: No such file"):
        MutualTls(tmp_path, WORKERS)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")
def test_the_commands_of_the_page_make_a_secret_that_can_be_used(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "worker-tls.md").read_text()
    [block] = re.findall(r"```sh\n(.*?)```", page, flags=re.DOTALL)
    commands, told, _ = block.rpartition("kubectl create secret generic chat-workers ")
    assert told
    subprocess.run(["bash", "-ec", commands], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    assert MutualTls(tmp_path, WORKERS).not_after > 0


def test_the_certificate_of_the_page_is_one_that_can_be_used() -> None:
    page = (ROOT / "docs" / "worker-tls.md").read_text()
    [block] = re.findall(r"```yaml\n(apiVersion: cert-manager.*?)```", page, flags=re.DOTALL)
    last = list(yaml.safe_load_all(block))[-1]
    assert set(last["spec"]["usages"]) >= {"server auth", "client auth"}
    assert last["spec"]["dnsNames"] == [WORKERS]
