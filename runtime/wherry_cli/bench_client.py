"""A streaming client of the OpenAI API that takes the time of every piece."""

import time
from collections.abc import Callable
from typing import Any

import aiohttp
import msgspec

from wherry_cli.bench_flags import Api
from wherry_cli.bench_stats import Outcome

Message = tuple[str, str]  # role, content
CONNECT_S = 10.0


class _Delta(msgspec.Struct):
    content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None

    @property
    def piece(self) -> str:
        return (self.delta.content if self.delta is not None else self.text) or ""


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: Any = None


_decode = msgspec.json.Decoder(_Chunk).decode
_encode = msgspec.json.Encoder().encode


class _Broken(Exception):
    """The answer did not become whole. The message is the kind of failure."""


class BenchClient:
    """Sends requests to one server.

    Args:
        clock: seconds since the test began.
        options: fields of every request beside those that the workload sets.
    """

    def __init__(
        self,
        url: str,
        model: str,
        api: Api,
        *,
        api_key: str | None,
        timeout_s: float,
        options: dict[str, Any],
        clock: Callable[[], float],
    ) -> None:
        base = url.rstrip("/").removesuffix("/v1")
        self._url = base + ("/v1/chat/completions" if api == "chat" else "/v1/completions")
        self._chat = api == "chat"
        self._clock = clock
        self._options = {"model": model, "stream": True, "stream_options": {"include_usage": True}, **options}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=timeout_s, sock_connect=CONNECT_S),
            headers={"content-type": "application/json"} | ({"authorization": f"Bearer {api_key}"} if api_key else {}),
        )

    async def close(self) -> None:
        """Closes every connection."""
        await self._session.close()

    def _body(self, messages: list[Message], output_tokens: int, seed: int) -> bytes:
        prompt: dict[str, Any] = (
            {"messages": [{"role": role, "content": content} for role, content in messages]}
            if self._chat
            else {"prompt": "\n".join(content for _, content in messages)}
        )
        return _encode({**self._options, **prompt, "max_tokens": output_tokens, "seed": seed})

    async def ask(
        self, messages: list[Message], output_tokens: int, seed: int, scheduled: float, turn: int
    ) -> tuple[Outcome, str]:
        """One request: what became of it, and the answer's text."""
        body = self._body(messages, output_tokens, seed)
        outcome = Outcome(scheduled=scheduled, sent=self._clock(), turn=turn, gaps=[])
        pieces: list[str] = []
        try:
            async with self._session.post(self._url, data=body) as response:
                if response.status != 200:
                    outcome.failure = f"HTTP {response.status}"
                    await response.read()
                else:
                    await self._read(response, outcome, pieces)
        except _Broken as broken:
            outcome.failure = str(broken)
        except (aiohttp.ConnectionTimeoutError, aiohttp.ClientConnectorError):
            outcome.failure = "no connection"
        except TimeoutError:
            outcome.failure = "timeout"
        except (aiohttp.ClientError, OSError):
            outcome.failure = "cut off" if pieces else "connection lost"
        except (msgspec.DecodeError, ValueError):
            outcome.failure = "not the OpenAI API"
        outcome.end = self._clock()
        return outcome, "".join(pieces)

    async def _read(self, response: aiohttp.ClientResponse, outcome: Outcome, pieces: list[str]) -> None:
        buffer, last = b"", 0.0
        async for data in response.content.iter_any():
            now = self._clock()
            *lines, buffer = (buffer + data).split(b"\n")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                value = line[5:].strip()
                if value == b"[DONE]":
                    if not outcome.output_tokens:
                        outcome.output_tokens = len(pieces)
                    if outcome.first is None:
                        raise _Broken("empty answer")
                    return
                piece = _take(_decode(value), outcome)
                if piece is None:
                    continue
                if outcome.first is None:
                    outcome.first = now
                else:
                    outcome.gaps.append(now - last)
                last = now
                pieces.append(piece)
        raise _Broken("cut off" if pieces else "empty answer")


def _take(chunk: _Chunk, outcome: Outcome) -> str | None:
    """The chunk's text, if it has any; its counts go into `outcome`."""
    if chunk.error is not None:
        raise _Broken("error in the stream")
    if chunk.usage is not None:
        outcome.prompt_tokens = chunk.usage.prompt_tokens
        outcome.output_tokens = chunk.usage.completion_tokens
        details = chunk.usage.prompt_tokens_details
        outcome.cached_tokens = (details.cached_tokens or 0) if details is not None else 0
    return next((choice.piece for choice in chunk.choices if choice.piece), None)


class Clock:
    """Seconds since it was made."""

    def __init__(self) -> None:
        self._began = time.perf_counter()

    def __call__(self) -> float:
        return time.perf_counter() - self._began
