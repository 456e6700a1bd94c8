"""An endpoint that speaks OpenAI's `/v1/embeddings` with a real, small embedding: hashed n-grams of characters, by
which texts with similar words are near one another. No model has to be downloaded for it.

Run: `python -m tests.router.embedding_server`; it prints its URL. `POST /mock` says how to fail, and answers how often
it was asked.
"""

import hashlib
import json
import math
import re
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

DIMENSIONS = 384
# Words that say little about what is asked.
_COMMON = frozenset(
    re.findall(r"\w+", "a an and are can do for how i in is it me my of on please tell the to was what you")
)


def embed(text: str) -> list[float]:
    """Of length 1; equal texts have equal vectors on every machine."""
    vector = [0.0] * DIMENSIONS
    for word in re.findall(r"\w+", text.lower()):
        weight = 0.2 if word in _COMMON else 1.0
        padded = f"<{word}>"
        grams = {padded[at : at + size] for size in (3, 4, 5) for at in range(len(padded) - size + 1)}
        for gram in {padded, *grams}:
            digest = hashlib.blake2b(gram.encode(), digest_size=8).digest()
            sign = 1.0 if digest[0] & 1 else -1.0
            vector[int.from_bytes(digest[1:], "little") % DIMENSIONS] += sign * weight / math.sqrt(1 + len(grams))
    length = math.sqrt(sum(x * x for x in vector)) or 1.0
    return [x / length for x in vector]


class _State:
    asked = 0
    redirected = 0
    status = 200
    delay_s = 0.0
    body = ""
    key = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])) or b"{}")
        if self.path == "/mock":
            for name, value in body.items():
                setattr(_State, name, value)
            self._answer(200, {"asked": _State.asked, "redirected": _State.redirected})
        elif self.path == "/elsewhere":
            _State.redirected += 1
            self._answer(200, {"data": [{"embedding": embed(body["input"])}]})
        else:
            self._embeddings(body)

    def _embeddings(self, body: dict[str, Any]) -> None:
        _State.asked += 1
        time.sleep(_State.delay_s)
        if _State.key and self.headers.get("authorization") != f"Bearer {_State.key}":
            self._answer(401, {})
        elif _State.status != 200:
            self._answer(_State.status, {}, location="/elsewhere")
        elif _State.body:
            self._answer(200, json.loads(_State.body))
        else:
            self._answer(200, {"object": "list", "data": [{"index": 0, "embedding": embed(body["input"])}]})

    def _answer(self, status: int, body: Any, location: str = "") -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        if location:
            self.send_header("location", location)
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's name
        pass


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    sys.stdout.write(f"http://127.0.0.1:{server.server_port}\n")
    sys.stdout.flush()
    server.serve_forever()


if __name__ == "__main__":
    main()
