"""What kubelets may ask a worker that listens with mutual TLS: they have no certificate to show.

A listener of its own, without TLS, that knows `GET /health` and `GET /ready` and nothing else.
"""

import msgspec

from wherry_protocol.http.asgi import Receive, Scope, Send, respond
from wherry_runtime.server.lifecycle import Lifecycle
from wherry_runtime.server.surface import Engine

_encode = msgspec.json.Encoder().encode


class ProbeApp:
    """The ASGI app."""

    def __init__(self, engine: Engine, lifecycle: Lifecycle) -> None:
        self._answers = {
            b"/health": lambda: lifecycle.health(engine),
            b"/ready": lifecycle.ready,
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        answer = self._answers.get(scope["raw_path"])
        if answer is None:
            await respond(send, 404, b'{"code":"not_found","message":"probes only: /health and /ready"}')
        elif scope["method"] != "GET":
            await respond(send, 405, b'{"code":"method_not_allowed","message":"use GET"}')
        else:
            status, report = answer()
            await respond(send, status, _encode(report))
