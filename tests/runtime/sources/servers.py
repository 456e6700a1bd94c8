"""Servers on loopback that models are downloaded from, and that misbehave when told to."""

import base64
import hashlib
import hmac
import json
import re
import threading
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, quote, unquote, urlsplit

TOKEN = "hf_" + "s3cr3t" * 5
COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class Answer:
    """`cut`: the connection is closed after so many bytes of the body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None


@dataclass
class Asked:
    path: str
    query: dict[str, str]
    headers: dict[str, str]


Fault = Callable[[Answer], Answer]


def cut(after: int) -> Fault:
    def apply(answer: Answer) -> Answer:
        answer.cut = after
        return answer

    return apply


def status(code: int, **headers: str) -> Fault:
    return lambda _: Answer(code, b"no", {name.replace("_", "-"): value for name, value in headers.items()})


def wrong_bytes(answer: Answer) -> Answer:
    answer.body = bytes(byte ^ 1 for byte in answer.body)
    return answer


def too_many_bytes(answer: Answer) -> Answer:
    return Answer(200, answer.body + b"more", answer.headers)


class Origin:
    """A server of files with ranges. `faults` are applied one after the other to the answers of a path.

    `gate` holds back bodies beyond their first `gate_after` bytes until it is set.
    """

    def __init__(self) -> None:
        self.faults: defaultdict[str, list[Fault]] = defaultdict(list)
        self.asked: list[Asked] = []
        self.served: Counter[str] = Counter()  # bytes of bodies by path
        self.gate = threading.Event()
        self.gate.set()
        self.gate_after = 0
        self.lock = threading.Lock()

    def answer(self, asked: Asked) -> Answer:
        raise NotImplementedError

    def of(self, path: str) -> list[Asked]:
        return [asked for asked in self.asked if asked.path.endswith(path)]

    @contextmanager
    def running(self, host: str = "127.0.0.1") -> Iterator[str]:
        server = ThreadingHTTPServer((host, 0), self._handler())
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"http://{host}:{server.server_address[1]}"
        finally:
            self.gate.set()
            server.shutdown()
            thread.join()
            server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        origin = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_GET(self) -> None:
                parts = urlsplit(self.path)
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(unquote(parts.path), dict(parse_qsl(parts.query, keep_blank_values=True)), headers)
                with origin.lock:
                    origin.asked.append(asked)
                    waiting = origin.faults.get(asked.path)
                    fault = waiting.pop(0) if waiting else None
                answer = origin.answer(asked)
                self._send(asked, ranged(asked, fault(answer) if fault else answer))

            def _send(self, asked: Asked, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in {"content-length": str(len(answer.body)), **answer.headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                body = answer.body if answer.cut is None else answer.body[: answer.cut]
                try:
                    for begin in range(0, len(body), 65536):
                        if begin >= origin.gate_after:
                            origin.gate.wait(30)
                        part = body[begin : begin + 65536]
                        self.wfile.write(part)
                        with origin.lock:
                            origin.served[asked.path] += len(part)
                except OSError:
                    self.close_connection = True
                if answer.cut is not None:
                    self.close_connection = True

        return Handler


def ranged(asked: Asked, answer: Answer) -> Answer:
    """The part of the answer that was asked for: https://www.rfc-editor.org/rfc/rfc9110#name-range."""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", asked.headers.get("range", ""))
    if wanted is None or answer.status != 200:
        return answer
    size, first = len(answer.body), int(wanted[1])
    last = min(int(wanted[2] or size), size - 1)
    if first >= size:
        return Answer(416, b"", {"content-range": f"bytes */{size}"})
    headers = {**answer.headers, "content-range": f"bytes {first}-{last}/{size}"}
    return Answer(206, answer.body[first : last + 1], headers, answer.cut)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Content(Origin):
    """Where the hub's large files are: another origin, which must not see the hub's token."""

    def __init__(self) -> None:
        super().__init__()
        self.blobs: dict[str, bytes] = {}

    def answer(self, asked: Asked) -> Answer:
        if "authorization" in asked.headers:
            return Answer(400, b"only one auth mechanism")
        blob = self.blobs.get(asked.path.removeprefix("/blob/"))
        return Answer(404) if blob is None else Answer(200, blob)


class Hub(Origin):
    """The hub's API, as far as downloads go. `large` files are redirected to `content`."""

    def __init__(self, files: dict[str, bytes], content: Content, content_url: str) -> None:
        super().__init__()
        self.repo, self.files, self.commit = "org/model", files, COMMIT
        self.large = {path for path in files if path.endswith((".safetensors", ".gguf", ".bin"))}
        self.content, self.content_url = content, content_url
        self.token: str | None = None
        self.gated = False

    def answer(self, asked: Asked) -> Answer:
        if self.token is not None and asked.headers.get("authorization") != f"Bearer {self.token}":
            code = "GatedRepo" if self.gated else "RepoNotFound"
            return Answer(401, b"{}", {"x-error-code": code, "x-error-message": "no"})
        if asked.path in (f"/api/models/{self.repo}/revision/{name}" for name in ("main", self.commit, "v1")):
            return Answer(200, json.dumps(self._info()).encode(), {"content-type": "application/json"})
        if asked.path.startswith(f"/api/models/{self.repo}/revision/"):
            return Answer(404, b"{}", {"x-error-code": "RevisionNotFound"})
        prefix = f"/{self.repo}/resolve/{self.commit}/"
        path = asked.path.removeprefix(prefix)
        if not asked.path.startswith(prefix) or path not in self.files:
            return Answer(404, b"{}", {"x-error-code": "RepoNotFound"})
        data = self.files[path]
        if path not in self.large:
            return Answer(200, data, {"etag": f'"{git_sha1(data)}"', "x-repo-commit": self.commit})
        self.content.blobs[sha256(data)] = data
        headers = {
            "location": f"{self.content_url}/blob/{sha256(data)}?X-Signature=signed-by-the-hub",
            "x-linked-etag": f'"{sha256(data)}"',
            "x-linked-size": str(len(data)),
        }
        return Answer(302, b"", headers)

    def _info(self) -> dict[str, Any]:
        siblings = []
        for path, data in self.files.items():
            entry: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": git_sha1(data)}
            if path in self.large:
                entry["lfs"] = {"sha256": sha256(data), "size": len(data), "pointerSize": 134}
            siblings.append(entry)
        return {"id": self.repo, "sha": self.commit, "siblings": siblings}


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Files(Origin):
    """A plain web server."""

    def __init__(self, files: dict[str, bytes]) -> None:
        super().__init__()
        self.files = files
        self.authorization: str | None = None

    def answer(self, asked: Asked) -> Answer:
        if self.authorization and asked.headers.get("authorization") != self.authorization:
            return Answer(401)
        data = self.files.get(asked.path)
        return Answer(404) if data is None else Answer(200, data)


class Registry(Origin):
    """A registry that wants a token of its own login for pulls."""

    def __init__(self) -> None:
        super().__init__()
        self.manifests: dict[str, bytes] = {}
        self.blobs: dict[str, bytes] = {}
        self.url = ""
        self.login: str | None = None

    def push(self, files: dict[str, bytes], key: str, media_type: str = "application/octet-stream") -> str:
        """An artifact under the tag `v1`, with file names in the annotation `key`. Its digest."""
        return self.push_layers([(data, media_type, {key: name}) for name, data in files.items()])

    def push_layers(self, layers: list[tuple[bytes, str, dict[str, str]]]) -> str:
        """The same of layers: content, media type and annotations of each."""
        described = []
        for data, media_type, annotations in layers:
            digest = f"sha256:{sha256(data)}"
            self.blobs[digest] = data
            described.append({"mediaType": media_type, "digest": digest, "size": len(data), "annotations": annotations})
        body = json.dumps({"schemaVersion": 2, "layers": described}).encode()
        digest = f"sha256:{sha256(body)}"
        self.manifests |= {"v1": body, digest: body}
        return digest

    def answer(self, asked: Asked) -> Answer:
        if asked.path == "/token":
            if asked.headers.get("authorization") != f"Basic {self.login}":
                return Answer(401)
            return Answer(200, json.dumps({"token": f"for {asked.query['scope']}"}).encode())
        if self.login and asked.headers.get("authorization") != "Bearer for repository:models/tiny:pull":
            challenge = f'Bearer realm="{self.url}/token",service="registry"'
            return Answer(401, b"{}", {"www-authenticate": challenge})
        kind, _, name = asked.path.removeprefix("/v2/models/tiny/").partition("/")
        data = {"manifests": self.manifests, "blobs": self.blobs}.get(kind, {}).get(name)
        return Answer(404, b"{}") if data is None else Answer(200, data)


class ObjectStore(Origin):
    """ListObjectsV2 and GetObject with AWS' signatures checked:
    https://docs.aws.amazon.com/AmazonS3/latest/API/sig-v4-authenticating-requests.html."""

    KEY, SECRET = "AKIAEXAMPLE", "the/secret+key"

    def __init__(self, bucket: str, objects: dict[str, bytes]) -> None:
        super().__init__()
        self.bucket, self.objects = bucket, objects
        self.page = 2
        self.encrypted = False

    def answer(self, asked: Asked) -> Answer:
        if not self._signed(asked):
            return Answer(403, b"<Error><Code>SignatureDoesNotMatch</Code></Error>")
        bucket, _, key = asked.path.removeprefix("/").partition("/")
        if bucket != self.bucket:
            return Answer(404, b"<Error><Code>NoSuchBucket</Code></Error>")
        if not key:
            return Answer(200, self._list(asked), {"content-type": "application/xml"})
        data = self.objects.get(key)
        if data is None:
            return Answer(404, b"<Error><Code>NoSuchKey</Code></Error>")
        if asked.headers.get("if-match", self._etag(data)) != self._etag(data):
            return Answer(412)
        headers = {"x-amz-server-side-encryption": "aws:kms"} if self.encrypted else {}
        return Answer(200, data, {"etag": self._etag(data), **headers})

    def _etag(self, data: bytes) -> str:
        return f'"{hashlib.md5(data + (b"kms" if self.encrypted else b"")).hexdigest()}"'

    def _list(self, asked: Asked) -> bytes:
        prefix, after = asked.query.get("prefix", ""), asked.query.get("continuation-token", "")
        keys = sorted(key for key in self.objects if key.startswith(prefix) and key > after)
        page, more = keys[: self.page], len(keys) > self.page
        entries = "".join(
            f"<Contents><Key>{key}</Key><LastModified>2026-01-01T00:00:00.000Z</LastModified>"
            f"<ETag>{self._etag(self.objects[key]).replace(chr(34), '&quot;')}</ETag>"
            f"<Size>{len(self.objects[key])}</Size></Contents>"
            for key in page
        )
        token = f"<NextContinuationToken>{page[-1]}</NextContinuationToken>" if more else ""
        return (
            f'<?xml version="1.0" encoding="UTF-8"?><ListBucketResult><Name>{self.bucket}</Name>'
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}{entries}</ListBucketResult>"
        ).encode()

    def _signed(self, asked: Asked) -> bool:
        query = dict(asked.query)
        if "X-Amz-Signature" in query:
            signature, payload = query.pop("X-Amz-Signature"), "UNSIGNED-PAYLOAD"
            credential, when, names = query["X-Amz-Credential"], query["X-Amz-Date"], query["X-Amz-SignedHeaders"]
        else:
            found = dict(re.findall(r"(\w+)=([^,\s]+)", asked.headers.get("authorization", "")))
            if not found:
                return False
            signature, credential, names = found["Signature"], found["Credential"], found["SignedHeaders"]
            when, payload = asked.headers["x-amz-date"], asked.headers["x-amz-content-sha256"]
        key, _, scope = credential.partition("/")
        canonical = "\n".join(
            (
                "GET",
                quote(asked.path),
                "&".join(f"{quote(k, safe='-_.~')}={quote(v, safe='-_.~')}" for k, v in sorted(query.items())),
                "".join(f"{name}:{asked.headers[name].strip()}\n" for name in names.split(";")),
                names,
                payload,
            )
        )
        text = "\n".join(("AWS4-HMAC-SHA256", when, scope, sha256(canonical.encode())))
        secret = f"AWS4{self.SECRET}".encode()
        for part in scope.split("/"):
            secret = hmac.digest(secret, part.encode(), "sha256")
        return key == self.KEY and hmac.compare_digest(hmac.digest(secret, text.encode(), "sha256").hex(), signature)


def basic(user: str, password: str) -> str:
    return base64.b64encode(f"{user}:{password}".encode()).decode()
