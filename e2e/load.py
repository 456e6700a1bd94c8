"""Requests in the background, and what became of each."""

import threading
import time
from types import TracebackType

import httpx
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
    """Clients that stream one answer after the other until the block ends. `failures` has what went wrong: an error, a
    stream without its end, or a text that is not `expected`. `gaps` has the longest pause of each stream, in seconds.
    """

    def __init__(self, url: str, clients: int, max_tokens: int = 400) -> None:
        self.finished = 0
        self.failures: list[str] = []
        self.gaps: list[float] = []
        self._url, self._max_tokens = url, max_tokens
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._stream_on, daemon=True) for _ in range(clients)]
        with client(url) as openai_client:
            self.expected, _ = self._answer(openai_client)

    def __enter__(self) -> "Streams":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(180)
        hanging = sum(thread.is_alive() for thread in self._threads)
        if hanging:
            self.failures.append(f"{hanging} streams never ended")

    @property
    def gap_p99(self) -> float:
        """Of the longest pauses."""
        return sorted(self.gaps)[int(0.99 * (len(self.gaps) - 1))]

    def _answer(self, openai_client: openai.OpenAI) -> tuple[str, float]:
        """The text of one whole stream, and its longest pause after the first token."""
        text, finish, longest, last = "", None, 0.0, 0.0
        for chunk in openai_client.chat.completions.create(
            model="tiny",
            messages=QUESTION,
            max_tokens=self._max_tokens,
            temperature=0,
            stream=True,
            extra_body={"ignore_eos": True},
        ):
            now = time.monotonic()
            longest, last = max(longest, now - last if last else 0.0), now
            for choice in chunk.choices:
                text += choice.delta.content or ""
                finish = choice.finish_reason or finish
        if finish != "length":
            raise ValueError(f"ended with {finish} after {len(text)} characters")
        return text, longest

    def _stream_on(self) -> None:
        with client(self._url) as openai_client:
            while not self._stop.is_set():
                wrong, gap = "", 0.0
                try:
                    text, gap = self._answer(openai_client)
                    wrong = "" if text == self.expected else f"another text: {text!r}"
                except (openai.OpenAIError, ValueError, httpx.HTTPError) as error:
                    wrong = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.finished += not wrong
                    self.gaps += [] if wrong else [gap]
                    self.failures += [wrong] if wrong else []
