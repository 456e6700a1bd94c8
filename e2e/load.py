"""Requests in the background, and what became of each."""

import asyncio
import json
import threading
import time
from types import TracebackType

import aiohttp
import openai

QUESTION = [{"role": "user", "content": "How do I list the files in a directory?"}]


class Load:
    """Clients that ask one question after the other until the block ends. `failures` has what went wrong."""

    def __init__(self, url: str, clients: int = 4, max_tokens: int = 24) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._url, self._max_tokens = url, max_tokens
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_on, daemon=True) for _ in range(clients)]

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120)
        if hanging := sum(thread.is_alive() for thread in self._threads):
            self.failures.append(f"{hanging} requests never ended")

    def _ask_on(self) -> None:
        with client(self._url) as openai_client:
            while not self._stop.is_set():
                try:
                    answer = openai_client.chat.completions.create(
                        model="tiny", messages=QUESTION, max_tokens=self._max_tokens, temperature=0
                    )
                    wrong = "" if answer.choices[0].finish_reason in ("stop", "length") else f"cut short: {answer}"
                except openai.OpenAIError as error:
                    wrong = f"{type(error).__name__}: {error}"
                with self._lock:
                    if wrong:
                        self.failures.append(wrong)
                    else:
                        self.answered += 1


def client(url: str) -> openai.OpenAI:
    """An unmodified client that does not try again by itself."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


class Streams:
    """Clients that stream one answer after the other until the block ends, light enough to be many on few cores.

    `failures` has what went wrong: an error, a stream without its end, or another text than undisturbed. `gaps` has
    the longest pause of each stream, in seconds.
    """

    def __init__(self, url: str, clients: int, max_tokens: int = 400) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self.gaps: list[float] = []
        self._url, self._clients = url, clients
        self._body = {
            "model": "tiny",
            "messages": QUESTION,
            "max_tokens": max_tokens,
            "temperature": 0,
            "stream": True,
            "ignore_eos": True,
        }
        self._over = threading.Event()
        self._expected = asyncio.run(self._one())
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()), daemon=True)

    def __enter__(self) -> "Streams":
        self._thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join(180)
        if self._thread.is_alive():
            self.failures.append("some streams never ended")

    @property
    def gap_p99(self) -> float:
        """Of the longest pauses."""
        return sorted(self.gaps)[int(0.99 * (len(self.gaps) - 1))]

    async def _one(self) -> str:
        async with session() as http:
            text, _ = await self._answer(http)
            return text

    async def _all(self) -> None:
        async with session() as http:
            await asyncio.gather(*(self._stream_on(http) for _ in range(self._clients)))

    async def _stream_on(self, http: aiohttp.ClientSession) -> None:
        while not self._over.is_set():
            try:
                text, gap = await self._answer(http)
                wrong = "" if text == self._expected else f"another text: {text!r}"
            except (aiohttp.ClientError, TimeoutError, ValueError) as error:
                wrong = f"{type(error).__name__}: {error}"
            if wrong:
                self.failures.append(wrong)
                await asyncio.sleep(0.5)
            else:
                self.gaps.append(gap)
                self.answered += 1

    async def _answer(self, http: aiohttp.ClientSession) -> tuple[str, float]:
        """The text of one whole stream, and its longest pause once it had begun.

        Raises:
            ValueError: it is not whole.
        """
        body, longest, last = bytearray(), 0.0, 0.0
        async with http.post(f"{self._url}/v1/chat/completions", json=self._body) as response:
            async for part in response.content.iter_any():
                now = time.monotonic()
                longest, last = max(longest, now - last if last else 0.0), now
                body += part
            if response.status != 200:
                raise ValueError(f"{response.status}: {body[:500]!r}")
        return text_of(bytes(body)), longest


def session() -> aiohttp.ClientSession:
    """For streams."""
    timeout = aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=60)
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout, trust_env=False)


def text_of(stream: bytes) -> str:
    """What a whole stream said.

    Raises:
        ValueError: it was cut, or ended otherwise than by its length.
    """
    *frames, done, rest = stream.split(b"\n\n")
    if (done, rest) != (b"data: [DONE]", b""):
        raise ValueError(f"cut after {len(stream)} bytes: {stream[-300:]!r}")
    text, finish = "", None
    for frame in frames:
        for choice in json.loads(frame.removeprefix(b"data: ")).get("choices", []):
            text += choice["delta"].get("content") or ""
            finish = choice["finish_reason"] or finish
    if finish != "length":
        raise ValueError(f"ended with {finish} after {len(text)} characters: {stream[-300:]!r}")
    return text
