"""Requests in the background, and what became of each."""

import threading
from types import TracebackType

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
