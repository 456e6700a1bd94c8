"""How many tokens a request will take, before anybody knows. Pure."""

from collections.abc import Sequence

from wherry_protocol.openai.embeddings import EmbeddingRequest
from wherry_protocol.openai.requests import ChatCompletionRequest, Request
from wherry_protocol.worker import EXPECTED_OUTPUT

# What a chat template writes around a turn.
_TURN = 8
_FIRST_GUESS = 1 / 3
_MOST = 1.5


class PromptScale:
    """Tokens per byte of prompts, learned from those that were counted. Quick to go up, slow to come down: what was
    reserved too low lets more in than there is room for."""

    __slots__ = ("per_byte",)

    def __init__(self) -> None:
        self.per_byte = _FIRST_GUESS

    def note(self, size: int, tokens: int) -> None:
        """A prompt of `size` bytes had so many tokens."""
        if size >= 16:
            seen = min(tokens / size, _MOST)
            self.per_byte += (seen - self.per_byte) * (0.5 if seen > self.per_byte else 0.02)


class Estimate:
    """`size`: bytes of the prompts that are text; `known`: tokens of the others; `choices`; tokens of each at most.
    Texts that are embedded have no answers."""

    __slots__ = ("choices", "known", "output", "size", "told")

    def __init__(self, request: Request | EmbeddingRequest) -> None:
        self.size = self.known = self.choices = self.output = 0
        self.told = True
        if isinstance(request, EmbeddingRequest):
            self._add(request.input)
            return
        prompts: list[str | list[int]] | list[str]
        if isinstance(request, ChatCompletionRequest):
            prompts, count = [turn.content or "" for turn in request.messages], 1
            self.known = _TURN * len(prompts)
        else:
            prompts, count = request.prompt, len(request.prompt)
        self._add(prompts)
        self.choices = count * (request.n or 1)
        limit = request.limit()
        self.told = limit is not None
        self.output = EXPECTED_OUTPUT if limit is None else limit

    def _add(self, prompts: Sequence[str | list[int]]) -> None:
        for prompt in prompts:
            if isinstance(prompt, str):
                self.size += len(prompt) if prompt.isascii() else len(prompt.encode("utf-8", "surrogatepass"))
            else:
                self.known += len(prompt)

    def tokens(self, scale: PromptScale) -> int:
        """Of prompts and answers together."""
        return int(self.size * scale.per_byte) + 1 + self.known + self.choices * self.output

    @property
    def asked(self) -> int:
        """Tokens that the request itself asks for."""
        return self.choices * self.output if self.told else 0
