"""What is special about each source: how it names, signs and checks."""

import io
import logging
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.runtime.sources.servers import (
    Answer,
    Files,
    ObjectStore,
    Registry,
    basic,
    cut,
    sha256,
    status,
    wrong_bytes,
)

from wherry_cli.serve import default_name
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.locate import local_uri, locate
from wherry_runtime.sources import http
from wherry_runtime.sources.fetch import fetch
from wherry_runtime.sources.http import Http, redirected, retry_after
from wherry_runtime.sources.select import select
from wherry_runtime.sources.store import RECORD
from wherry_runtime.sources.types import Request, TransferError

MODEL = {"config.json": b"{}", "model.safetensors": bytes(range(256)) * 1000, "tokenizer.json": b"{ }"}
GGUF = b"GGUF" + bytes(70_000)


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != RECORD}


# ---- S3


@contextmanager
def objects(monkeypatch: pytest.MonkeyPatch, extra: dict[str, bytes] | None = None) -> Iterator[ObjectStore]:
    found = {f"models/tiny/{name}": data for name, data in MODEL.items()}
    store = ObjectStore("bucket", {**found, "models/tiny-other/x.json": b"not of it", **(extra or {})})
    with store.running() as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", store.KEY)
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", store.SECRET)
        yield store


def test_a_prefix_of_a_bucket_is_a_model(
    monkeypatch: pytest.MonkeyPatch, cache: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with objects(monkeypatch) as store, caplog.at_level(logging.INFO):
        store.faults["/bucket/models/tiny/model.safetensors"] = [lambda a: a, cut(100_000), status(503)]
        found = fetch("s3://bucket/models/tiny", cache)
        assert contents(found) == MODEL
        assert len(store.of("/bucket")) == 2  # pages of two
        store.asked.clear()
        assert fetch("s3://bucket/models/tiny/", cache) == found
        assert not store.of("model.safetensors")
    assert store.SECRET not in caplog.text
    assert "X-Amz" not in caplog.text
    assert '"md5"' in (found / RECORD).read_text()


def test_keys_of_a_secret_are_used(monkeypatch: pytest.MonkeyPatch, cache: Path, tmp_path: Path) -> None:
    with objects(monkeypatch) as store:
        for name, value in {"AWS_ACCESS_KEY_ID": store.KEY, "AWS_SECRET_ACCESS_KEY": store.SECRET}.items():
            (tmp_path / name).write_text(value)
            monkeypatch.setenv(name, "wrong")
        with pytest.raises(ModelError) as failure:
            fetch("s3://bucket/models/tiny", cache)
        assert failure.value.code == "access_denied"
        monkeypatch.setenv("WHERRY_MODEL_SECRET", str(tmp_path))
        assert contents(fetch("s3://bucket/models/tiny", cache)) == MODEL


def test_an_object_that_is_encrypted_by_kms_has_no_md5_and_is_taken(
    monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    with objects(monkeypatch) as store:
        store.encrypted = True
        assert contents(fetch("s3://bucket/models/tiny", cache)) == MODEL


def test_an_object_that_changes_meanwhile_is_no_model(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with objects(monkeypatch) as store:
        path = "models/tiny/model.safetensors"

        def change(answer: object) -> object:
            store.objects[path] = bytes(256_000)
            return cut(100_000)(answer)  # type: ignore[arg-type]

        store.faults[f"/bucket/{path}"] = [lambda a: a, change]  # type: ignore[list-item]
        with pytest.raises(ModelError) as failure:
            fetch("s3://bucket/models/tiny", cache)
        assert failure.value.code == "changed"
        assert fetch("s3://bucket/models/tiny", cache).joinpath("model.safetensors").read_bytes() == bytes(256_000)


@pytest.mark.parametrize("right", [True, False])
def test_a_list_of_checksums_beside_the_objects_counts(
    monkeypatch: pytest.MonkeyPatch, cache: Path, right: bool
) -> None:
    data = {**MODEL} if right else {**MODEL, "config.json": b"{ }"}
    sums = "".join(f"{sha256(content)}  {name}\n" for name, content in data.items()).encode()
    with objects(monkeypatch, {"models/tiny/SHA256SUMS": sums}):
        if right:
            assert contents(fetch("s3://bucket/models/tiny", cache)) == MODEL
        else:
            with pytest.raises(ModelError, match=r"config\.json: its sha256 is"):
                fetch("s3://bucket/models/tiny", cache)


def test_a_gguf_in_a_bucket(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    with objects(monkeypatch, {"g/a.gguf": GGUF, "g/b.gguf": b"GGUF"}):
        assert locate(local_uri("s3://bucket/g/a.gguf", cache)).read_bytes() == GGUF
        with pytest.raises(ModelError, match=r"name one in the URI: a\.gguf, b\.gguf"):
            fetch("s3://bucket/g", cache)


# ---- the web


def test_a_file_of_a_web_server(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    server = Files({"/m/a.gguf": GGUF})
    server.authorization = "Bearer of-the-web-server"
    with server.running() as url:
        uri = f"{url}/m/a.gguf#sha256={sha256(GGUF)}"
        with pytest.raises(ModelError) as failure:
            fetch(uri, cache)
        assert failure.value.code == "access_denied"
        monkeypatch.setenv("HTTP_AUTHORIZATION", server.authorization)
        server.faults["/m/a.gguf"] = [lambda a: a, cut(65_536)]
        assert fetch(uri, cache).read_bytes() == GGUF
        server.asked.clear()
        assert fetch(uri, cache).read_bytes() == GGUF
        assert server.asked == []
        with pytest.raises(ModelError, match="its sha256 is") as failure:
            fetch(f"{url}/m/a.gguf#sha256={'0' * 64}", cache)
        assert failure.value.code == "corrupt_download"


def test_a_damaged_file_of_a_server_that_tells_no_sizes(cache: Path) -> None:
    server = Files({"/a.gguf": GGUF})
    with server.running() as url:
        uri = f"{url}/a.gguf#sha256={sha256(GGUF)}"
        found = fetch(uri, cache)
        os.truncate(found, 10)
        server.faults["/a.gguf"] = [lambda _: Answer(206)]  # to the question for the size
        assert fetch(uri, cache).read_bytes() == GGUF


def test_a_list_of_checksums_on_a_web_server(cache: Path) -> None:
    sums = "".join(f"{sha256(data)} *{name}\n" for name, data in {**MODEL, "notes.md": b""}.items()).encode()
    server = Files({f"/m/{name}": data for name, data in MODEL.items()} | {"/m/SHA256SUMS": sums})
    with server.running() as url:
        assert contents(fetch(f"{url}/m/SHA256SUMS#sha256={sha256(sums)}", cache)) == MODEL
        server.faults["/m/SHA256SUMS"] = [wrong_bytes]
        with pytest.raises(ModelError) as failure:
            fetch(f"{url}/m/SHA256SUMS?x=1#sha256={sha256(sums)}", cache.with_name("other"))
        assert failure.value.code == "corrupt_download"


# ---- OCI


@pytest.fixture
def registry() -> Iterator[Registry]:
    found = Registry()
    with found.running() as found.url:
        yield found


@pytest.mark.parametrize("key", ["org.cncf.model.filepath", "org.opencontainers.image.title"])
def test_an_artifact_of_a_registry(registry: Registry, cache: Path, key: str) -> None:
    digest = registry.push(MODEL, key)
    host = registry.url.removeprefix("http://")
    found = fetch(f"oci://{host}/models/tiny:v1", cache)
    assert contents(found) == MODEL
    registry.asked.clear()
    assert fetch(f"oci://{host}/models/tiny@{digest}", cache) == found
    assert registry.asked == []


def test_a_login_of_a_docker_configuration(
    registry: Registry, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry.push(MODEL, "org.cncf.model.filepath")
    registry.login = basic("robot", "pass:word")
    host = registry.url.removeprefix("http://")
    with pytest.raises(ModelError) as failure:
        fetch(f"oci://{host}/models/tiny:v1", cache)
    assert failure.value.code == "access_denied"
    (tmp_path / ".dockerconfigjson").write_text(f'{{"auths": {{"{host}": {{"auth": "{registry.login}"}}}}}}')
    monkeypatch.setenv("WHERRY_MODEL_SECRET", str(tmp_path))
    assert contents(fetch(f"oci://{host}/models/tiny:v1", cache)) == MODEL


@pytest.mark.parametrize(
    ("media_type", "fault", "code"),
    [
        ("application/vnd.oci.image.layer.v1.tar+gzip", None, "corrupt_download"),
        ("application/vnd.oci.image.layer.v1.tar+zstd", None, "unsupported_format"),
        ("application/octet-stream", "blob", "corrupt_download"),
        ("application/octet-stream", "manifest", "corrupt_download"),
    ],
)
def test_artifacts_that_are_no_model(
    registry: Registry, cache: Path, media_type: str, fault: str | None, code: str
) -> None:
    digest = registry.push(MODEL, "org.cncf.model.filepath", media_type)
    if fault == "blob":
        registry.faults[f"/v2/models/tiny/blobs/sha256:{sha256(MODEL['config.json'])}"] = [wrong_bytes] * 9
    elif fault == "manifest":
        registry.manifests[digest] += b" "
    with pytest.raises(ModelError) as failure:
        fetch(f"oci://{registry.url.removeprefix('http://')}/models/tiny@{digest}", cache)
    assert failure.value.code == code


IMAGE, PACK = "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.cncf.model.weight.v1.tar"


def archive(files: dict[str, bytes], *, gzip: bool, links: dict[str, str] | None = None) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz" if gzip else "w") as tar:
        for name, target in (links or {}).items():
            link = tarfile.TarInfo(name)
            link.type, link.linkname = tarfile.SYMTYPE, target
            tar.addfile(link)
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def test_an_image_with_a_models_directory(registry: Registry, cache: Path) -> None:
    base = archive(
        {"etc/passwd": b"root", "models/old.md": b"x"}, gzip=True, links={"bin": "usr/bin", "lib": "/usr/lib"}
    )
    layer = archive({f"./models/{name}": data for name, data in MODEL.items()}, gzip=True)
    registry.push_layers([(base, IMAGE, {}), (layer, IMAGE, {})])
    uri = f"oci://{registry.url.removeprefix('http://')}/models/tiny:v1"
    registry.faults[f"/v2/models/tiny/blobs/sha256:{sha256(layer)}"] = [cut(500)]
    found = fetch(uri, cache)
    assert contents(found) == MODEL
    assert not list(cache.rglob("*passwd*"))
    assert not list(cache.rglob("*.tar"))
    (found / "config.json").unlink()
    assert contents(fetch(uri, cache)) == MODEL


def test_a_model_pack_of_archives_and_files(registry: Registry, cache: Path) -> None:
    title = "org.cncf.model.filepath"
    weights = archive({"model.safetensors": MODEL["model.safetensors"]}, gzip=False)
    layers = [
        (weights, PACK, {title: "model.safetensors"}),
        (MODEL["config.json"], "application/vnd.cncf.model.weight.config.v1.raw", {title: "config.json"}),
        (MODEL["tokenizer.json"], "application/vnd.cncf.model.weight.config.v1.raw", {title: "tokenizer.json"}),
        (b"# read me", "application/vnd.cncf.model.doc.v1.raw", {title: "notes.txt"}),
    ]
    registry.push_layers(layers)
    assert contents(fetch(f"oci://{registry.url.removeprefix('http://')}/models/tiny:v1", cache)) == MODEL


@pytest.mark.parametrize(
    ("files", "links", "code"),
    [
        ({"models/../../evil.json": b"x"}, {}, "unsafe_name"),
        ({"models//etc/../evil.json": b"x"}, {}, "unsafe_name"),
        ({"models/.wherry.json": b"x"}, {}, "unsafe_name"),
        ({"models/config.json": b"x"}, {"models/out": "/tmp"}, "unsupported_format"),
        ({"models/out/evil.json": b"x"}, {"models/out": "/tmp"}, "unsupported_format"),
        ({"models/.wh.config.json": b""}, {}, "unsupported_format"),
        ({"models/config.json": b"x"}, {}, "model_not_found"),
        ({"other/model.safetensors": b"x"}, {}, "model_not_found"),
    ],
)
def test_archives_that_do_not_mean_well(
    registry: Registry, cache: Path, files: dict[str, bytes], links: dict[str, str], code: str
) -> None:
    registry.push_layers([(archive(files, gzip=True, links=links), IMAGE, {})])
    with pytest.raises(ModelError) as failure:
        fetch(f"oci://{registry.url.removeprefix('http://')}/models/tiny:v1", cache)
    assert failure.value.code == code
    assert not list(cache.parent.rglob("evil*"))
    assert not list(cache.glob("*/snapshots/*"))


# ---- all of them


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("hf://name", "hf://ORG/NAME"),
        ("hf://org/name/../x", "there is no"),
        ("s3://", "s3://BUCKET/PREFIX"),
        ("s3://UPPER/x", "s3://BUCKET/PREFIX"),
        ("https://host/model.gguf", "needs its checksum: https://host/model.gguf#sha256=HEX"),
        ("https://host/model.gguf#sha256=abc", "needs its checksum"),
        (f"https://host/model.tar#sha256={'0' * 64}", r"name a \.gguf file"),
        (f"https://user:secret@host/a.gguf#sha256={'0' * 64}", "credentials do not belong into a URI"),
        ("oci://host/Upper:v1", "in small letters"),
        ("oci://user:secret@host/a:v1", "credentials do not belong into a URI"),
        ("ftp://host/a.gguf", "it is downloaded from hf://"),
    ],
)
def test_uris_that_are_none(hub: object, cache: Path, uri: str, message: str) -> None:
    with pytest.raises(ModelError, match=message) as failure:
        fetch(uri.replace("org/name", "org/model"), cache)
    assert "secret" not in failure.value.message
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("url", "location", "refused"),
    [
        ("https://hub.example/a", "https://cdn.example/b", ""),
        ("https://hub.example/a", "/b", ""),
        ("http://10.0.0.5/a", "http://10.0.0.6/b", ""),
        ("https://hub.example/a", "http://cdn.example/b", "from https to http"),
        ("https://hub.example/a", "https://169.254.169.254/latest/meta-data", "private network"),
        ("https://hub.example/a", "https://[::1]/b", "private network"),
        ("https://hub.example/a", "https://inside.example/b", "private network"),
        ("https://hub.example/a", "https://[::ffff:10.0.0.1]/b", "private network"),
        ("https://hub.example/a", "ftp://cdn.example/b", "not HTTP"),
        ("https://hub.example/a", "file:///etc/passwd", "not HTTP"),
    ],
)
def test_redirects(monkeypatch: pytest.MonkeyPatch, url: str, location: str, refused: str) -> None:
    addresses = {"hub.example": "93.184.215.14", "cdn.example": "93.184.215.15", "inside.example": "10.1.2.3"}

    def look_up(host: str, *_: object) -> list[tuple[object, ...]]:
        return [(2, 1, 6, "", (addresses[host], 0))]

    monkeypatch.setattr(http.socket, "getaddrinfo", look_up)
    request = Request(url, {"authorization": "Bearer x", "range": "bytes=5-", "cookie": "a=b"})
    if refused:
        with pytest.raises(TransferError, match=refused):
            redirected(request, location, url)
        return
    found = redirected(request, location, url)
    assert found.headers.get("range") == "bytes=5-"
    assert ("authorization" in found.headers) == (location == "/b")


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"ratelimit": '"api";r=0;t=55'}, 55),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({}, None),
    ],
)
def test_how_long_a_server_wants_to_be_left_alone(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers) == seconds


def test_a_proxy_is_used_and_gets_its_login(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A proxy of plain HTTP is a server that is asked for whole URLs."""
    proxy = Files({"/a.gguf": GGUF})
    with proxy.running() as url:
        monkeypatch.setenv("http_proxy", url.replace("http://", "http://user:pass%40word@"))
        uri = f"http://files.example/a.gguf#sha256={sha256(GGUF)}"
        assert fetch(uri, cache).read_bytes() == GGUF
    assert proxy.asked[0].headers["host"] == "files.example"
    assert proxy.asked[0].headers["proxy-authorization"] == f"Basic {basic('user', 'pass@word')}"


@pytest.mark.parametrize(
    ("model", "name"),
    [
        ("hf://org/name", "name"),
        ("hf://org/name@main", "name"),
        ("hf://org/name@main/a-Q4.gguf", "a-Q4.gguf"),
        ("oci://localhost:5000/a/tiny:v1", "tiny"),
        (f"oci://host/a/tiny@sha256:{'0' * 64}", "tiny"),
        ("https://host/a.gguf?x=1#sha256=00", "a.gguf"),
        ("s3://bucket/models/tiny/", "tiny"),
        ("sample://tiny", "tiny"),
        ("/models/tiny/", "tiny"),
    ],
)
def test_what_a_served_model_is_called(model: str, name: str) -> None:
    assert default_name(model) == name


def test_nobody_answers(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TRIES", 2)
    with pytest.raises(TransferError, match="nobody answers there"), Http().once(Request("http://127.0.0.1:9/x")):
        pass


SELECTED = [
    ("shards and not the single file", ["model.safetensors", "model-00001-of-00002.safetensors",
      "model-00002-of-00002.safetensors", "model.safetensors.index.json", "config.json"],
     {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json",
      "config.json"}),
    ("Mistral's own file left out", ["consolidated.safetensors", "model.safetensors", "params.json"],
     {"model.safetensors", "params.json"}),
    ("only Mistral's own file",
     ["consolidated.safetensors", "params.json"], {"consolidated.safetensors", "params.json"}),
    ("other runtimes' weights", ["model.safetensors", "onnx/model.onnx", "onnx/config.json", "tf_model.h5",
      "flax_model.msgpack", "pytorch_model.bin", "pytorch_model.bin.index.json", "original/params.json"],
     {"model.safetensors"}),
    ("pooling of sentence embeddings", ["model.safetensors", "modules.json", "1_Pooling/config.json"],
     {"model.safetensors", "modules.json", "1_Pooling/config.json"}),
    ("no code", ["model.safetensors", "modeling_x.py", "chat_template.jinja", "tokenizer.model"],
     {"model.safetensors", "chat_template.jinja", "tokenizer.model"}),
    ("safetensors before GGUF", ["model.safetensors", "a.gguf"], {"model.safetensors"}),
]  # fmt: skip


@pytest.mark.parametrize(("paths", "wanted"), [s[1:] for s in SELECTED], ids=[s[0] for s in SELECTED])
def test_what_is_downloaded(paths: list[str], wanted: set[str]) -> None:
    assert select(paths) == (sorted(wanted), "")
    inside = [f"sub/{path}" for path in paths]
    assert set(select([*inside, "config.json"], "sub")[0]) == {f"sub/{path}" for path in wanted}


@pytest.mark.parametrize(
    ("paths", "inside", "code"),
    [
        (["pytorch_model.bin", "config.json"], "", "unsupported_format"),
        (["config.json"], "", "model_not_found"),
        (["model.safetensors"], "nope", "model_not_found"),
        (["model.safetensors"], "model.safetensors", "unsupported_format"),
        (["a-00001-of-00002.gguf"], "", "model_not_found"),
        ([], "", "model_not_found"),
    ],
)
def test_what_is_no_model(paths: list[str], inside: str, code: str) -> None:
    with pytest.raises(TransferError) as failure:
        select(paths, inside)
    assert failure.value.code == code
