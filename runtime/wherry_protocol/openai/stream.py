"""From a worker's events to OpenAI chunks. Chunks differ in one string: the rest is made once."""

import msgspec

from wherry_protocol.openai.answers import Usage, chat_logprobs, text_logprobs
from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import End, Token

DONE = b"data: [DONE]\n\n"
_encode = msgspec.json.Encoder().encode


class Chunks:
    """Writes the server-sent events of one answer."""

    def __init__(self, answer_id: str, created: int, model: str, *, chat: bool, include_usage: bool) -> None:
        self._chat = chat
        kind = "chat.completion.chunk" if chat else "text_completion"
        head = {"id": answer_id, "object": kind, "created": created, "model": model}
        self._head = b"data: " + _encode(head)[:-1]
        self._tail = b',"usage":null}\n\n' if include_usage else b"}\n\n"
        self._offsets: dict[int, int] = {}

    def _choice(self, index: int, delta: bytes, logprobs: bytes, reason: bytes) -> bytes:
        parts = (
            b',"choices":[{"index":%d,' % index,
            delta,
            b',"logprobs":',
            logprobs,
            b',"finish_reason":',
            reason,
            b"}]",
        )
        return b"".join((self._head, *parts, self._tail))

    def _delta(self, text: str) -> bytes:
        return b'"delta":{"content":%s}' % _encode(text) if self._chat else b'"text":%s' % _encode(text)

    def first(self, index: int) -> bytes:
        """What precedes a choice's tokens: the role in chat, nothing in a completion."""
        if not self._chat:
            return b""
        return self._choice(index, b'"delta":{"role":"assistant","content":""}', b"null", b"null")

    def token(self, index: int, event: Token) -> bytes:
        """New text; nothing where the text is still held back."""
        if event.logprobs:
            return self._choice(index, self._delta(event.text), self._logprobs(index, event), b"null")
        if not event.text:
            return b""
        return self._choice(index, self._delta(event.text), b"null", b"null")

    def _logprobs(self, index: int, event: Token) -> bytes:
        if self._chat:
            return _encode(chat_logprobs(event.logprobs))
        value, self._offsets[index] = text_logprobs(event.logprobs, self._offsets.get(index, 0))
        return _encode(value)

    def end(self, index: int, event: End) -> bytes:
        """Why the choice ended."""
        delta = b'"delta":{}' if self._chat else b'"text":""'
        return self._choice(index, delta, b"null", b'"%s"' % event.finish_reason.encode())

    def usage(self, usage: Usage) -> bytes:
        """The chunk without choices that `include_usage` asks for."""
        return self._head + b',"choices":[],"usage":' + _encode(usage.to_dict()) + b"}\n\n"

    def error(self, error: ApiError) -> bytes:
        """The event that ends a stream which cannot go on; no `[DONE]` follows it."""
        return b"data: " + error.body() + b"\n\n"
