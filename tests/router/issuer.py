"""A real OIDC issuer on loopback: it serves its documents over HTTP, changes its keys, and dies."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import jwt
from cryptography.hazmat.primitives.asymmetric import ec, rsa


class Issuer:
    def __init__(self, port: int = 0) -> None:
        self.hits: dict[str, int] = {}
        self.keys: dict[str, Any] = {}
        self.algorithm = ""  # that keys say they are for
        self.named: str | None = None  # what it calls itself, if not by its own name
        issuer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                issuer.hits[self.path] = issuer.hits.get(self.path, 0) + 1
                document = issuer.document(self.path)
                self.send_response(404 if document is None else 200)
                self.end_headers()
                self.wfile.write(json.dumps(document).encode())

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.start()

    def document(self, path: str) -> dict[str, Any] | None:
        if path == "/.well-known/openid-configuration":
            return {"issuer": self.named or self.url, "jwks_uri": self.url + "/keys"}
        if path == "/keys":
            extra = {"alg": self.algorithm} if self.algorithm else {}
            return {"keys": [_public(kid, key) | extra for kid, key in self.keys.items()]}
        return None

    def add(self, kid: str, kind: str = "EC") -> None:
        self.keys[kid] = (
            ec.generate_private_key(ec.SECP256R1()) if kind == "EC" else rsa.generate_private_key(65537, 2048)
        )

    def token(self, kid: str, *, key: Any = None, algorithm: str = "", **claims: Any) -> str:
        key = key or self.keys[kid]
        algorithm = algorithm or ("ES256" if isinstance(key, ec.EllipticCurvePrivateKey) else "RS256")
        now = int(time.time())
        base = {"iss": self.url, "aud": "wherry", "sub": "alice", "exp": now + 600, "iat": now}
        payload = {name: value for name, value in (base | claims).items() if value is not None}
        return jwt.encode(payload, key, algorithm, headers={"kid": kid})

    def die(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(10)


def _public(kid: str, key: Any) -> dict[str, Any]:
    algorithm = (
        jwt.algorithms.ECAlgorithm if isinstance(key, ec.EllipticCurvePrivateKey) else jwt.algorithms.RSAAlgorithm
    )
    return {**algorithm.to_jwk(key.public_key(), as_dict=True), "kid": kid, "use": "sig"}
