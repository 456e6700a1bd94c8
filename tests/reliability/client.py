"""Clients: one asks for a whole answer, one streams it and records every chunk that comes."""

import asyncio
import socket
from typing import Any

import aiohttp
import msgspec
from tests.reliability.history import Asked, Chunk, Over, Recorder
from tests.reliability.workload import Client

# Nothing for so long is a hang. Far above every deadline that a router has.
PATIENCE_S = 20.0
_PACE_S = 0.02
_PACED_S = 2.0
_DATA = b"data: "


def session() -> aiohttp.ClientSession:
    """For well-behaved clients."""
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), trust_env=False)


def narrow_session() -> aiohttp.ClientSession:
    """For slow clients: what they do not read soon stands in their way."""

    def small(info: tuple[Any, ...]) -> socket.socket:
        sock = socket.socket(*info[:3])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        return sock

    connector = aiohttp.TCPConnector(limit=0, socket_factory=small)
    return aiohttp.ClientSession(connector=connector, read_bufsize=1024, trust_env=False)


async def whole(http: aiohttp.ClientSession, url: str, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The answer, not streamed.

    Raises:
        RuntimeError: the status is not 200.
    """
    body = {name: value for name, value in body.items() if name != "stream_options"}
    async with http.post(url + path, json=body, timeout=aiohttp.ClientTimeout(total=120)) as response:
        if response.status != 200:
            raise RuntimeError(f"{response.status}: {await response.text()}")
        return dict(await response.json())


async def stream(
    http: aiohttp.ClientSession,
    url: str,
    recorder: Recorder,
    number: int,
    client: Client,
    path: str,
    body: dict[str, Any],
    patience_s: float = PATIENCE_S,
) -> None:
    """Streams one answer as `client` does, and records it all. Gives up after `patience_s` of silence. Never raises."""
    recorder.add(Asked, stream=number, path=path, body=body, paced=client.paced)
    outcome, code = "cut", ""
    try:
        # A client that leaves at once does so about when its request reaches a worker.
        limit = 0.03 if client.leaves_after == 0 else patience_s
        timeout = aiohttp.ClientTimeout(total=None, sock_read=patience_s)
        async with asyncio.timeout(limit) as begin:
            response = await http.post(url + path, json=body | {"stream": True}, timeout=timeout)
            begin.reschedule(None)
        async with response:
            if response.status != 200:
                outcome, code = "refused", f"{response.status} {await _code(response)}"
            else:
                outcome, code = await _read(response, recorder, number, client)
    except TimeoutError:
        outcome = "left" if client.leaves_after == 0 else "hung"
    except aiohttp.ClientError as error:
        code = type(error).__name__
    recorder.add(Over, stream=number, outcome=outcome, code=code)


async def _code(response: aiohttp.ClientResponse) -> str:
    try:
        return str(msgspec.json.decode(await response.read())["error"]["code"])
    except (msgspec.DecodeError, KeyError, TypeError):
        return ""


async def _read(response: aiohttp.ClientResponse, recorder: Recorder, number: int, client: Client) -> tuple[str, str]:
    """The outcome of a stream that began, and its error's code. Reads to the end of the body whatever comes."""
    outcome, code, buffer, seen, paced = "cut", "", b"", 0, 0.0
    async for data in response.content.iter_any():
        *frames, buffer = (buffer + data).split(b"\n\n")
        for frame in frames:
            if not frame.startswith(_DATA):
                continue
            if frame == b"data: [DONE]":
                if outcome == "done":
                    return "cut", "second [DONE]"
                outcome = "done"
                continue
            chunk = msgspec.json.decode(frame[len(_DATA) :])
            if "error" in chunk:
                if outcome == "done":
                    return "cut", "error after [DONE]"
                outcome, code = "error", str(chunk["error"].get("code"))
                continue
            if outcome != "cut":
                return "cut", "chunk after the end"
            recorder.add(Chunk, stream=number, data=chunk)
            seen += 1
            if client.leaves_after is not None and seen >= client.leaves_after:
                response.close()
                return "left", ""
        if client.paced and paced < _PACED_S:
            paced += _PACE_S
            await asyncio.sleep(_PACE_S)
    return outcome, code
