"""What the OpenAI API stands on: something that turns an `ExecuteRequest` into events."""

from collections.abc import AsyncGenerator
from typing import Protocol

from wherry_protocol.worker import Event, ExecuteRequest


class Backend(Protocol):
    """Workers behind a router, or one engine in the same process."""

    def generate(
        self, request: ExecuteRequest, correlation_id: str, *, replayable: bool
    ) -> AsyncGenerator[Event, None]:
        """The events of one generation; closing the generator cancels it.

        `replayable`: nothing reached the client yet and nothing will before the end, so another worker may begin anew
        after tokens were yielded. A second `started` says that it did, and voids what came before.

        Raises:
            ApiError: before the first event, when the request cannot be run.
        """

    def unready(self) -> str | None:
        """Why no request can be answered now; None: one can."""
