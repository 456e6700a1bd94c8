"""Getting binaries: a real HTTP server that serves whole, truncated and corrupt files; a real Go build."""

import hashlib
import http.server
import io
import os
import shutil
import subprocess
import sys
import tarfile
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from wherry_local.assets import download as downloading
from wherry_local.assets.catalog import KIND_SET, LOCAL, Asset, catalog
from wherry_local.assets.download import DownloadError, download, expected_sum
from wherry_local.assets.gobuild import BuildError, build
from wherry_local.assets.provide import provide
from wherry_local.errors import LocalError
from wherry_local.files import read_json
from wherry_local.lifecycle import quiet

BINARY = b"#!/bin/sh\necho I run\n" + os.urandom(3 << 20)


class Publisher:
    """Serves `files` (path → bytes); a path in `cut` ends after half of its bytes, though it announced them all."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {}
        self.cut: set[str] = set()
        self.asked: list[str] = []
        publisher = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                publisher.asked.append(self.path)
                body = publisher.files.get(self.path)
                if body is None:
                    self.send_error(404)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body[: len(body) // 2] if self.path in publisher.cut else body)

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever)
        self.thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def publish(self, asset: Asset, content: bytes, *, checksum_of: bytes | None = None) -> str:
        path = urlsplit(asset.url).netloc + urlsplit(asset.url).path
        digest = hashlib.sha256(checksum_of if checksum_of is not None else content).hexdigest()
        self.files[f"/{path}"] = content
        sums = f"{'0' * 64}  other.tar.gz\n{digest}  {asset.url.rpartition('/')[2]}\n"
        self.files[f"/{urlsplit(asset.checksums).netloc}{urlsplit(asset.checksums).path}"] = sums.encode()
        return f"/{path}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


@pytest.fixture
def publisher(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Publisher]:
    server = Publisher()
    monkeypatch.setenv("WHERRY_DOWNLOAD_MIRROR", server.url)
    monkeypatch.setenv("WHERRY_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("WHERRY_ASSETS", raising=False)
    yield server
    server.close()


@pytest.fixture
def no_go(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")


def archive(member: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        info = tarfile.TarInfo(member)
        info.size = len(content)
        tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def test_a_whole_download_becomes_an_executable(publisher: Publisher, no_go: None) -> None:
    publisher.publish(catalog()["kubectl"], BINARY)
    publisher.publish(catalog()["etcd"], archive(catalog()["etcd"].member, b"etcd itself"))
    directory = provide(["kubectl", "etcd"], quiet)
    assert (directory / "kubectl").read_bytes() == BINARY
    assert (directory / "etcd").read_bytes() == b"etcd itself"
    assert os.access(directory / "kubectl", os.X_OK)
    assert read_json(directory / "versions.json") == {name: catalog()[name].version for name in ("kubectl", "etcd")}

    asked = len(publisher.asked)
    assert provide(["kubectl", "etcd"], quiet) == directory
    assert len(publisher.asked) == asked, "what is cached is not asked for again"


@pytest.mark.parametrize("fault", ["truncated", "corrupt", "missing", "no checksum", "archive without it"])
def test_a_bad_download_never_becomes_a_binary(publisher: Publisher, no_go: None, fault: str) -> None:
    asset = catalog()["etcd" if fault == "archive without it" else "kubectl"]
    path = publisher.publish(asset, BINARY, checksum_of=b"something else" if fault == "corrupt" else None)
    if fault == "truncated":
        publisher.cut.add(path)
    elif fault == "missing":
        del publisher.files[path]
    elif fault == "no checksum":
        publisher.files[path + ".sha256"] = b"<html>sign in</html>"
    elif fault == "archive without it":
        publisher.publish(asset, archive("another/file", b"x"))
    with pytest.raises(LocalError, match=r"could not be downloaded .* no Go"):
        provide([asset.name], quiet)
    left = {entry.name for entry in (Path(os.environ["WHERRY_CACHE"]) / "bin").iterdir()}
    assert left <= {".lock", "versions.json"}


def test_a_download_that_is_bad_once_is_tried_again(publisher: Publisher, monkeypatch: pytest.MonkeyPatch) -> None:
    path = publisher.publish(catalog()["kubectl"], BINARY)
    publisher.cut.add(path)
    real = downloading._fetch

    def heal(*arguments: object) -> None:
        try:
            real(*arguments)  # type: ignore[arg-type]
        finally:
            publisher.cut.clear()

    monkeypatch.setattr(downloading, "_fetch", heal)
    assert (provide(["kubectl"], quiet) / "kubectl").read_bytes() == BINARY


def test_an_unreachable_publisher_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_go: None) -> None:
    monkeypatch.setenv("WHERRY_DOWNLOAD_MIRROR", "http://127.0.0.1:9")
    with pytest.raises(DownloadError) as caught:
        download(catalog()["kubectl"], tmp_path, lambda _: None)
    assert caught.value.unreachable


def test_another_version_in_the_cache_is_replaced(publisher: Publisher, no_go: None) -> None:
    publisher.publish(catalog()["kubectl"], BINARY)
    directory = provide(["kubectl"], quiet)
    (directory / "kubectl").write_bytes(b"old")
    (directory / "versions.json").write_text('{"kubectl": "1.0.0"}')
    assert (provide(["kubectl"], quiet) / "kubectl").read_bytes() == BINARY


def test_two_runs_at_once_download_once(publisher: Publisher) -> None:
    path = publisher.publish(catalog()["kubectl"], BINARY)
    code = (
        "from wherry_local.assets.provide import provide\n"
        "from wherry_local.lifecycle import quiet\n"
        "provide(['kubectl'], quiet)"
    )
    runs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2)]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert publisher.asked.count(path) == 1


def test_given_assets_are_taken_as_they_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WHERRY_ASSETS", str(tmp_path))
    with pytest.raises(LocalError, match=r"lacks kubectl: put them there .* or unset \$WHERRY_ASSETS"):
        provide(["kubectl"], quiet)
    (tmp_path / "kubectl").touch(mode=0o755)
    assert provide(["kubectl"], quiet) == tmp_path
    with pytest.raises(LocalError, match="no such binary: kubectll"):
        provide(["kubectll"], quiet)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a" * 64, "a" * 64),
        (f"{'B' * 64} *dir/file.tgz\n", "b" * 64),
        (f"{'c' * 64}  other\n{'d' * 64}  file.tgz", "d" * 64),
    ],
)
def test_checksum_files(text: str, expected: str) -> None:
    assert expected_sum(text, "file.tgz") == expected


@pytest.mark.parametrize("text", ["", "not a sum", f"{'a' * 64}  other.tgz", "a" * 63])
def test_checksum_files_without_the_sum(text: str) -> None:
    with pytest.raises(DownloadError, match="names no sha256"):
        expected_sum(text, "file.tgz")


def test_every_binary_has_a_release_and_a_module() -> None:
    assert set(LOCAL) < set(KIND_SET) == set(catalog())
    for asset in catalog().values():
        assert asset.url.startswith("https://")
        assert asset.checksums.startswith("https://")
        assert asset.package.startswith(asset.module)


@pytest.mark.skipif(shutil.which("go") is None, reason="needs Go")
def test_a_failed_build_leaves_nothing_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GOPROXY", "off")
    monkeypatch.setenv("GOMODCACHE", str(tmp_path / "modules"))
    with pytest.raises(BuildError, match="go mod download failed"):
        build(catalog()["etcd"], tmp_path)
    assert not (tmp_path / "etcd").exists()
