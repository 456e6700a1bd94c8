"""Requests in the background, and what became of each."""

import threading
import time
from types import TracebackType
from typing import Self

import httpx
import openai

QUESTION = [{"role": "user", "content": "How do I list the files in a directory?"}]


def client(url: str) -> openai.OpenAI:
    """An unmodified client that does not try again by itself."""
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


class Clients:
    """Clients that ask one question after the other until the block ends. `failures` has what went wrong."""

    def __init__(self, url: str, clients: int) -> None:
        self.answered = 0
        self.failures: list[str] = []
        self._url = url
        self._stop = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask_on, daemon=True) for _ in range(clients)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(180)
        if hanging := sum(thread.is_alive() for thread in self._threads):
            self.failures.append(f"{hanging} requests never ended")

    def _ask_on(self) -> None:
        with client(self._url) as openai_client:
            while not self._stop.is_set():
                try:
                    wrong = self._ask(openai_client)
                except (openai.OpenAIError, httpx.HTTPError) as error:
                    wrong = f"{type(error).__name__}: {error}"
                with self._lock:
                    self.answered += not wrong
                    self.failures += [wrong] if wrong else []

    def _ask(self, openai_client: openai.OpenAI) -> str:
        """Asks once. What was wrong with the answer; empty: nothing."""
        raise NotImplementedError


class Load(Clients):
    """Answers that come whole."""

    def __init__(self, url: str, clients: int = 4, max_tokens: int = 24) -> None:
        super().__init__(url, clients)
        self._max_tokens = max_tokens

    def _ask(self, openai_client: openai.OpenAI) -> str:
        answer = openai_client.chat.completions.create(
            model="tiny", messages=QUESTION, max_tokens=self._max_tokens, temperature=0
        )
        return "" if answer.choices[0].finish_reason in ("stop", "length") else f"cut short: {answer}"


class Streams(Clients):
    """Streams. One without an end, or with another text than undisturbed, has failed, too. `gaps` has the longest pause
    of each, in seconds."""

    def __init__(self, url: str, clients: int, max_tokens: int = 400) -> None:
        super().__init__(url, clients)
        self.gaps: list[float] = []
        self._max_tokens = max_tokens
        with client(url) as openai_client:
            self._expected, _, _ = self._answer(openai_client)

    @property
    def gap_p99(self) -> float:
        """Of the longest pauses."""
        return sorted(self.gaps)[int(0.99 * (len(self.gaps) - 1))]

    def _ask(self, openai_client: openai.OpenAI) -> str:
        text, finish, longest = self._answer(openai_client)
        if finish != "length":
            return f"ended with {finish} after {len(text)} characters"
        if text != self._expected:
            return f"another text: {text!r}"
        self.gaps.append(longest)
        return ""

    def _answer(self, openai_client: openai.OpenAI) -> tuple[str, str | None, float]:
        """One stream's text, finish reason, and longest pause after the first token."""
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
        return text, finish, longest
