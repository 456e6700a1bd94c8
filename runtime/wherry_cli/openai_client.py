"""As much of an OpenAI client as a chat needs, on the standard library alone."""

import http.client
import json
from collections.abc import Iterator
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit


class ServerError(Exception):
    """The server cannot be reached or says no. The message is for the user."""


class Client:
    """`url` is the server's, with or without `/v1`.

    Raises:
        ServerError: `url` is not an http(s) URL.
    """

    def __init__(self, url: str, api_key: str | None, timeout_s: float = 600) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ServerError(f"{url!r} is not a URL such as http://127.0.0.1:8080")
        self._url = url
        self._parts = parts
        self._path = parts.path.rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"} | (
            {"Authorization": f"Bearer {api_key}"} if api_key else {}
        )
        self._timeout = timeout_s

    def _connect(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        return kind(self._parts.hostname or "", self._parts.port, timeout=self._timeout)

    def _ask(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: Any
    ) -> http.client.HTTPResponse:
        data = None if body is None else json.dumps(body).encode()
        try:
            connection.request(method, f"{self._path}/v1{path}", data, self._headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            raise ServerError(f"cannot reach {self._url}: {reason}; is the server running?") from None
        if response.status != 200:
            raise ServerError(f"{self._url} answered {response.status}: {_message(response.read())}")
        return response

    def models(self) -> list[str]:
        """Names of the models served."""
        with closing(self._connect()) as connection:
            body = self._ask(connection, "GET", "/models", None).read()
        try:
            return [str(model["id"]) for model in json.loads(body)["data"]]
        except (ValueError, KeyError, TypeError):
            raise ServerError(f"{self._url} does not speak the OpenAI API") from None

    def chat(self, request: dict[str, Any]) -> Iterator[str]:
        """The answer's text, piece by piece. Closing the iterator ends the answer."""
        with closing(self._connect()) as connection:
            response = self._ask(connection, "POST", "/chat/completions", {**request, "stream": True})
            try:
                for line in response:
                    data = line.strip().removeprefix(b"data:").strip()
                    if data == b"[DONE]":
                        return
                    if line.startswith(b"data:"):
                        yield from _pieces(json.loads(data))
            except (OSError, http.client.HTTPException, ValueError) as error:
                raise ServerError(f"the answer broke off: {str(error) or type(error).__name__}") from None
        raise ServerError("the answer broke off")


def _message(body: bytes) -> str:
    try:
        return str(json.loads(body)["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return body[:200].decode(errors="replace").strip() or "no reason given"


def _pieces(chunk: dict[str, Any]) -> Iterator[str]:
    if "error" in chunk:
        raise ServerError(str(chunk["error"].get("message", chunk["error"])))
    for choice in chunk.get("choices", []):
        if text := choice.get("delta", {}).get("content"):
            yield text
