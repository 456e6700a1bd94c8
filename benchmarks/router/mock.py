"""Mock workers that take no time: `python -m benchmarks.router.mock --replicas N [--interval S]`, a URL a line.

Each speaks Wherry's worker API and the OpenAI API on one port, from answers made up beforehand. Tokens are written one
by one, `--interval` seconds apart, or one each time round the event loop.
"""

import argparse
import asyncio
import functools
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import httptools
import uvloop
from benchmarks.router.wire import MODEL

from wherry_protocol.http.server import bind, stop_on_signals, url_of
from wherry_protocol.sse import encode_event
from wherry_protocol.worker import End, Event, LoadReport, Metrics, Started, Token

_TOKENS = re.compile(rb'"max_(?:completion_)?tokens":\s*(\d+)')  # sglang-router passes the one on as the other
_RESUMED = re.compile(rb'"token_ids":\[([\d,]+)\]')
_STREAM = re.compile(rb'"stream":\s*true')
_TEXT = "word "


def _head(kind: str, length: str) -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {kind}\r\n{length}\r\n\r\n".encode()


def _whole(value: Any) -> bytes:
    body = json.dumps(value, separators=(",", ":")).encode()
    return _head("application/json", f"content-length: {len(body)}") + body


def _chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


_SSE = _head("text/event-stream", "transfer-encoding: chunked")
_LAST = b"0\r\n\r\n"
_USAGE = {"prompt_tokens": 8, "completion_tokens": 1, "total_tokens": 9}


def _events(count: int, first: int) -> Iterator[Event]:
    yield Started("mock", 8, 0, 1, "mock")
    for index in range(first, count):
        yield Token(index, [index], _TEXT)
    yield Metrics(0.0, 0.0, 0.0)
    yield End("length", 8, count)


def _openai(delta: dict[str, str], finish: str | None = None) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    value = {"id": "mock", "object": "chat.completion.chunk", "created": 1, "model": MODEL, "choices": [choice]}
    return b"data: " + json.dumps(value, separators=(",", ":")).encode() + b"\n\n"


@functools.cache
def execute_frames(count: int, first: int = 0) -> list[bytes]:
    """An answer of the worker API, a write each: its head goes with the first, its end with the last token."""
    frames = [_chunk(encode_event(event)) for event in _events(count, first)]
    tokens = frames[1:-2] or [b""]
    tokens[0] = _SSE + frames[0] + tokens[0]
    tokens[-1] += b"".join(frames[-2:]) + _LAST
    return tokens


@functools.cache
def chat_frames(count: int) -> list[bytes]:
    """The same of the OpenAI API."""
    tokens = [_chunk(_openai({"content": _TEXT})) for _ in range(count)]
    tokens[0] = _SSE + _chunk(_openai({"role": "assistant", "content": ""})) + tokens[0]
    tokens[-1] += _chunk(_openai({}, "length")) + _chunk(b"data: [DONE]\n\n") + _LAST
    return tokens


@functools.cache
def chat_whole(count: int) -> bytes:
    """A whole answer."""
    message = {"role": "assistant", "content": _TEXT * count}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
    return _whole(
        {
            "id": "mock",
            "object": "chat.completion",
            "created": 1,
            "model": MODEL,
            "choices": [choice],
            "usage": {**_USAGE, "completion_tokens": count, "total_tokens": 8 + count},
        }
    )


def _load() -> bytes:
    zero = dict.fromkeys(LoadReport.__struct_fields__, 0)
    return _whole(zero | {"model": MODEL, "ready": True, "max_running": 4096, "kv_tokens_total": 1 << 30})


_GET = {
    b"/load": _load(),
    b"/v1/models": _whole({"object": "list", "data": [{"id": MODEL, "object": "model", "owned_by": "mock"}]}),
    b"/get_model_info": _whole({"model_path": MODEL, "served_model_name": MODEL, "is_generation": True}),
    b"/model_info": _whole({"model_path": MODEL, "served_model_name": MODEL, "is_generation": True}),
    b"/get_server_info": _whole({"model_path": MODEL, "served_model_name": MODEL}),
    b"/server_info": _whole({"model_path": MODEL, "served_model_name": MODEL}),
}
_OTHER = _whole({"status": "ok"})


class Mock(asyncio.Protocol):
    """One connection."""

    def __init__(self, interval: float) -> None:
        self._interval = interval
        self._loop = asyncio.get_running_loop()
        self._parser = httptools.HttpRequestParser(self)
        self._transport: Any = None
        self._url = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None

    def data_received(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError:
            self._transport.close()

    def on_url(self, url: bytes) -> None:
        self._url = url

    def on_header(self, name: bytes, value: bytes) -> None:
        if name.lower() == b"expect":
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, data: bytes) -> None:
        self._body.append(data)

    def on_message_complete(self) -> None:
        body, self._body = b"".join(self._body), []
        if self._parser.get_method() != b"POST":
            self._transport.write(_GET.get(self._url, _OTHER))
            return
        found = _TOKENS.search(body)
        count = int(found[1]) if found else 1
        if self._url == b"/execute":
            resumed = _RESUMED.search(body)
            self._write(execute_frames(count, resumed[1].count(b",") + 1 if resumed else 0), 0)
        elif self._url != b"/v1/chat/completions":
            self._transport.write(_OTHER)
        elif _STREAM.search(body):
            self._write(chat_frames(count), 0)
        else:
            self._transport.write(chat_whole(count))

    def _write(self, frames: list[bytes], index: int) -> None:
        if self._transport is None:
            return
        self._transport.write(frames[index])
        if index + 1 < len(frames):
            if self._interval:
                self._loop.call_later(self._interval, self._write, frames, index + 1)
            else:
                self._loop.call_soon(self._write, frames, index + 1)


async def _run(replicas: int, interval: float) -> None:
    stop = asyncio.Event()
    stop_on_signals(stop)
    loop = asyncio.get_running_loop()
    servers = []
    for _ in range(replicas):
        sock = bind("127.0.0.1", 0)
        servers.append(await loop.create_server(lambda: Mock(interval), sock=sock, backlog=2048))
        sys.stdout.write(url_of(sock) + "\n")
    sys.stdout.flush()
    await stop.wait()
    for server in servers:
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--interval", type=float, default=0.0, help="seconds between the tokens of a stream")
    args = parser.parse_args()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(_run(args.replicas, args.interval))


if __name__ == "__main__":
    main()
