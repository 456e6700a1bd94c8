"""A worker without a model, for tests and benchmarks: the real worker API, on a real socket, in a process of its own.

What it answers is told by the prompt, if that is JSON of a `Script`; else it says its name, the prompt and numbers, so
that a mixed-up answer is seen. Run: `python -m tests.router.mock_worker --name a --port 0`; it prints its URL.
"""

import argparse
import asyncio
import os
import sys
from contextlib import suppress
from pathlib import Path

import msgspec
import uvloop

from wherry_protocol.http.asgi import CancelOnDisconnect, Receive, Scope, Send, header, read_body, respond
from wherry_protocol.http.logs import set_up
from wherry_protocol.http.mutual_tls import MutualTls
from wherry_protocol.http.server import bind, serve, stop_on_signals, url_of
from wherry_protocol.prefix import pack_keys
from wherry_protocol.sse import encode_event, encode_load
from wherry_protocol.worker import (
    End,
    ErrorEvent,
    ExecuteRequest,
    LoadReport,
    LoadUpdate,
    Metrics,
    PrefixChange,
    Started,
    Token,
)

_decode = msgspec.json.Decoder(ExecuteRequest).decode


class Script(msgspec.Struct, kw_only=True, forbid_unknown_fields=True, omit_defaults=True):
    """How to answer one request."""

    tokens: int = 4
    text: str = ""  # each token's; empty: name, prompt and number
    pause_s: float = 0.0  # between tokens
    mute: bool = False  # take the request and never begin to answer
    hold: bool = False  # wait for ever before the first token
    hold_after: int = -1  # wait for ever after so many tokens
    status: int = 200  # refuse with this status
    code: str = "refused"
    only: str = ""  # the script holds for the worker of this name; others answer at once
    exit_after: int = -1  # the process ends after so many tokens
    error_after: int = -1  # an error event after so many tokens
    retryable: bool = False  # that error may be tried elsewhere
    garbage_after: int = -1  # something that is no event
    skip_after: int = -1  # a token is left out
    repeat_after: int = -1  # a token is told twice
    cut_after: int = -1  # the connection is cut
    named: bool = True  # the text says which worker it is from; else it is the same from all
    refuse_resume: bool = False
    forget_resume: bool = False  # as a worker does that has not heard of it


class State(msgspec.Struct):
    """What `GET /mock` tells and `POST /mock` sets."""

    name: str
    ready: bool = True
    running: int = 0
    executed: int = 0
    tokens_sent: int = 0
    cancelled: int = 0
    correlation_ids: list[str] = []
    request_ids: list[str] = []
    resumed_at: list[int] = []  # tokens that resumed requests came with
    cache_salts: list[str] = []
    reports: bool = True  # whether it pushes its load
    prefixes: list[int] = []  # keys that it says it has cached
    others: int = 0  # requests that it says it runs for other routers


class MockWorker:
    """The ASGI app."""

    def __init__(self, name: str, model: str, token: str | None, max_running: int) -> None:
        self.state = State(name)
        self._max_running = max_running
        self._model = model
        self._authorization = f"Bearer {token}".encode() if token else None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"]
        if path == "/execute":
            await self._execute(scope, receive, send)
        elif path == "/health":
            await respond(send, 200, b"{}")
        elif path == "/ready":
            await respond(send, 200 if self.state.ready else 503, b"{}")
        elif path == "/load/watch":
            await self._watch(scope, send)
        elif path == "/load":
            await respond(send, 200, msgspec.json.encode(self._load()))
        elif path == "/mock":
            if scope["method"] == "POST":
                change = msgspec.json.decode(await read_body(scope, receive, 10_000))
                for key, value in change.items():
                    setattr(self.state, key, value)
            await respond(send, 200, msgspec.json.encode(self.state))
        else:
            await respond(send, 404, b"{}")

    async def _watch(self, scope: Scope, send: Send) -> None:
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        told: list[int] | None = None
        async with CancelOnDisconnect(scope):
            while self.state.reports:
                prefixes = None
                if told != self.state.prefixes:
                    told = list(self.state.prefixes)
                    prefixes = PrefixChange(whole=True, added=pack_keys(told))
                body = encode_load(LoadUpdate(load=self._load(), prefixes=prefixes))
                await send({"type": "http.response.body", "body": body, "more_body": True})
                await asyncio.sleep(0.02)
        await send({"type": "http.response.body", "body": b""})

    def _load(self) -> LoadReport:
        totals = dict.fromkeys(
            ("prompt_tokens_total", "completion_tokens_total", "prefix_hit_tokens_total", "preemptions_total"), 0
        )
        return LoadReport(
            model=self._model,
            ready=self.state.ready,
            running=self.state.running + self.state.others,
            waiting=0,
            max_running=self._max_running,
            kv_tokens_used=0,
            kv_tokens_total=1_000_000,
            steps_total=0,
            heartbeat_age_s=0.0,
            tokens_owed=100 * (self.state.running + self.state.others),
            **totals,
        )

    async def _execute(self, scope: Scope, receive: Receive, send: Send) -> None:
        body = await read_body(scope, receive, 64 * 1024 * 1024)
        if self._authorization and header(scope, b"authorization") != self._authorization:
            await self._refuse(send, 401, "unauthorized")
            return
        request = _decode(body)
        self.state.executed += 1
        if len(self.state.correlation_ids) < 1000:
            self.state.correlation_ids.append((header(scope, b"x-correlation-id") or b"").decode())
            self.state.request_ids.append(request.id)
            self.state.cache_salts.append(request.cache_salt)
        prompt = request.prompt.text or (request.prompt.messages[-1].content if request.prompt.messages else "")
        script = Script()
        if prompt.startswith("{"):
            with suppress(msgspec.DecodeError):
                script = msgspec.json.decode(prompt, type=Script)
        if script.only not in ("", self.state.name):
            script = Script(tokens=script.tokens, text=script.text, named=script.named)
        if not self.state.ready:
            script = Script(status=503)
        resume = request.resume
        if resume is not None and not script.forget_resume:
            self.state.resumed_at.append(len(resume.token_ids))
            if script.refuse_resume or resume.token_ids != list(range(len(resume.token_ids))) or resume.seed != 1:
                script = Script(status=400, code="invalid_resume")
        if script.status != 200:
            await self._refuse(send, script.status, script.code)
            return
        self.state.running += 1
        guard = CancelOnDisconnect(scope)
        try:
            async with guard:
                await self._answer(send, request, prompt, script)
        finally:
            self.state.running -= 1
        self.state.cancelled += guard.gone

    async def _refuse(self, send: Send, status: int, code: str) -> None:
        error = ErrorEvent(code=code, message=f"{self.state.name} refuses", retryable=status in (429, 503))
        await respond(send, status, msgspec.json.encode(error), headers=[(b"retry-after", b"3")])

    async def _answer(self, send: Send, request: ExecuteRequest, prompt: str, script: Script) -> None:
        if script.mute:
            await asyncio.Event().wait()
        headers = [(b"content-type", b"text/event-stream")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def emit(data: bytes) -> None:
            await send({"type": "http.response.body", "body": data, "more_body": True})

        await emit(encode_event(Started(id=request.id, prompt_tokens=len(prompt), cached_tokens=0, seed=1)))
        if script.hold:
            await asyncio.Event().wait()
        first = 0 if request.resume is None or script.forget_resume else len(request.resume.token_ids)
        for index in range(first, script.tokens):
            if index == script.exit_after:
                await asyncio.sleep(0)  # what it has said goes out first
                os._exit(3)
            if index == script.error_after:
                await emit(encode_event(ErrorEvent(code="broken", message="it broke", retryable=script.retryable)))
                await send({"type": "http.response.body", "body": b""})
                return
            if index == script.garbage_after:
                await emit(b"event: token\ndata: {nonsense\n\n")
            if index == script.hold_after:
                await asyncio.Event().wait()
            if index == script.cut_after:
                raise ConnectionError("cut")
            if index == script.skip_after:
                continue
            text = script.text or f"{self.state.name if script.named else ''}|{prompt}|{index} "
            await emit(encode_event(Token(index=index, ids=[index], text=text)))
            if index == script.repeat_after:
                await emit(encode_event(Token(index=index, ids=[index], text=text)))
            self.state.tokens_sent += 1
            if script.pause_s:
                await asyncio.sleep(script.pause_s)
        await emit(encode_event(Metrics(queue_s=0, prefill_s=0, decode_s=0)))
        end = End(finish_reason="stop", prompt_tokens=len(prompt), completion_tokens=script.tokens)
        await emit(encode_event(end))
        await send({"type": "http.response.body", "body": b""})


async def _run(args: argparse.Namespace) -> None:
    stop = asyncio.Event()
    stop_on_signals(stop)
    sock = bind(args.host, args.port)
    if args.tls:
        set_up(level=30)
    tls = MutualTls(Path(args.tls), args.tls_name) if args.tls else None
    following = asyncio.create_task(tls.watched.run()) if tls else None
    sys.stdout.write(url_of(sock, "https" if tls else "http") + "\n")
    sys.stdout.flush()

    async def drain() -> None:
        pass

    app = MockWorker(args.name, args.model, args.token, args.max_running)
    await serve(app, [sock], stop, drain, tls.listener if tls else None)
    if following:
        following.cancel()


def main() -> None:
    """Runs until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="mock")
    parser.add_argument("--model", default="chat")
    parser.add_argument("--token")
    parser.add_argument("--tls", help="directory with ca.crt, tls.crt and tls.key: listen with mutual TLS")
    parser.add_argument("--tls-name", default="")
    parser.add_argument("--max-running", type=int, default=64)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=0)
    args = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(args))


if __name__ == "__main__":
    main()
