"""What the OpenAI API stands on: something that turns a worker's request into events."""

from collections.abc import AsyncGenerator
from typing import Protocol

from wherry_protocol.worker import EmbedRequest, Event, ExecuteRequest

Work = ExecuteRequest | EmbedRequest


class Delivery:
    """What the client has of an answer, and the `session` that it says the answer belongs to. Its choices share it.

    `whole`: it gets the answer in one piece at the end, so a choice may begin anew. `begun`: a token of some choice was
    passed on. From then on a choice is not refused any more, and what goes wrong can only end the answer.
    """

    __slots__ = ("begun", "session", "whole")

    def __init__(self, *, whole: bool, session: str = "") -> None:
        self.whole = whole
        self.session = session
        self.begun = False


class Backend(Protocol):
    """Workers behind a router, or one engine in the same process."""

    def generate(self, request: Work, correlation_id: str, delivery: Delivery) -> AsyncGenerator[Event, None]:
        """The events of one generation, or of texts that become vectors; closing the generator cancels it.

        Tokens follow on one another, whatever workers they come from. Only for a `whole` delivery a second `started`
        may come after tokens, or after vectors: it voids what came before.

        Raises:
            ApiError: before the first token, when the request cannot be run.
        """

    def unready(self) -> str | None:
        """Why no request can be answered now; None: one can."""
