"""From a worker's events to whole OpenAI answers."""

from typing import Any

import msgspec

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.worker import End, ErrorEvent, Event, PositionLogprobs, Token, TokenLogprob

_STATUS = {"cancelled": 503, "context_length_exceeded": 400}


def failure(event: ErrorEvent) -> ApiError:
    """The error that ends an answer which had begun."""
    return ApiError(
        _STATUS.get(event.code, 503 if event.retryable else 500), event.code, event.message, param=event.param
    )


def cancelled() -> ErrorEvent:
    """What a client is told when somebody else cancelled its request."""
    return ErrorEvent(code="cancelled", message="The request was cancelled by the server.", retryable=True)


class Usage(msgspec.Struct):
    """Tokens of an answer. `cached` of the prompt's came from the prefix cache."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    def add(self, end: End, *, with_prompt: bool) -> None:
        """Counts one choice; a prompt that several choices share counts once."""
        self.completion += end.completion_tokens
        if with_prompt:
            self.prompt += end.prompt_tokens
            self.cached += end.cached_tokens

    def to_dict(self) -> dict[str, Any]:
        """As the API names it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


def _chat_token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.text, "logprob": token.logprob, "bytes": token.bytes}


def chat_logprobs(positions: list[PositionLogprobs]) -> dict[str, Any]:
    """The `logprobs` of a chat choice."""
    return {
        "content": [
            {**_chat_token(position.sampled), "top_logprobs": [_chat_token(token) for token in position.top]}
            for position in positions
        ],
        "refusal": None,
    }


def text_logprobs(positions: list[PositionLogprobs], offset: int) -> tuple[dict[str, Any], int]:
    """The `logprobs` of a completion's choice whose first token starts at character `offset`, and the offset behind."""
    offsets = []
    for position in positions:
        offsets.append(offset)
        offset += len(position.sampled.text)
    value = {
        "tokens": [position.sampled.text for position in positions],
        "token_logprobs": [position.sampled.logprob for position in positions],
        "top_logprobs": [{token.text: token.logprob for token in position.top} for position in positions],
        "text_offset": offsets,
    }
    return value, offset


class Choice:
    """One choice as its events come in. `end` is set once it is whole."""

    def __init__(self, index: int, *, chat: bool, logprobs: bool) -> None:
        self._index = index
        self._chat = chat
        self._logprobs = logprobs
        self.restart()

    def restart(self) -> None:
        """Forgets what came so far: another worker begins anew."""
        self._texts: list[str] = []
        self._positions: list[PositionLogprobs] = []
        self.end: End | None = None

    def feed(self, event: Event) -> None:
        """Takes in an event.

        Raises:
            ApiError: the generation failed.
        """
        if type(event) is Token:
            self._texts.append(event.text)
            self._positions.extend(event.logprobs)
        elif type(event) is End:
            if event.finish_reason == "cancelled":
                raise failure(cancelled())
            self.end = event
        elif type(event) is ErrorEvent:
            raise failure(event)

    def to_dict(self) -> dict[str, Any]:
        """As the API names it."""
        text = "".join(self._texts)
        choice: dict[str, Any] = {"index": self._index}
        if self._chat:
            choice["message"] = {"role": "assistant", "content": text, "refusal": None}
            choice["logprobs"] = chat_logprobs(self._positions) if self._logprobs else None
        else:
            choice["text"] = text
            choice["logprobs"] = text_logprobs(self._positions, 0)[0] if self._logprobs else None
        choice["finish_reason"] = self.end.finish_reason if self.end else None
        return choice


def whole(answer_id: str, created: int, model: str, choices: list[Choice], usage: Usage, *, chat: bool) -> bytes:
    """The body of an answer that is not streamed."""
    return msgspec.json.encode(
        {
            "id": answer_id,
            "object": "chat.completion" if chat else "text_completion",
            "created": created,
            "model": model,
            "choices": [choice.to_dict() for choice in choices],
            "usage": usage.to_dict(),
        }
    )
