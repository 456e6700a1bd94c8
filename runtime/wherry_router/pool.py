"""The replicas that requests can go to now, and what each owes."""

import asyncio
import itertools
from collections.abc import Callable, Collection, Iterable

import msgspec

from wherry_protocol.worker import Event, Started, Token
from wherry_router.policies import least_outstanding

# What an answer is taken to cost while nobody knows its length.
EXPECTED_OUTPUT = 256


class Endpoint(msgspec.Struct, frozen=True):
    """Where a worker listens. `name` (a pod's name and UID) tells a worker from its successor at the same address."""

    name: str
    url: str


class Replica:
    """One worker as this router sees it."""

    __slots__ = ("endpoint", "execute_url", "last_chosen", "outstanding_tokens", "requests", "suspect")

    def __init__(self, endpoint: Endpoint) -> None:
        self.endpoint = endpoint
        self.execute_url = endpoint.url + "/execute"
        self.suspect = False
        self.outstanding_tokens = 0
        self.requests = 0
        self.last_chosen = 0


class Lease:
    """What one request makes its replica owe: estimated at first, put right by the events, nothing after `release`."""

    __slots__ = ("_output", "_prompt", "_replica")

    def __init__(self, replica: Replica, prompt_estimate: int, max_tokens: int | None) -> None:
        self._replica = replica
        self._prompt = prompt_estimate
        self._output = min(max_tokens or EXPECTED_OUTPUT, EXPECTED_OUTPUT)
        replica.requests += 1
        replica.outstanding_tokens += self._prompt + self._output

    def observe(self, event: Event) -> None:
        """Puts the estimate right."""
        if type(event) is Token:
            # The prompt has been read. One token stays owed until the end, however long the answer gets.
            output = max(self._output - len(event.ids), 1)
            self._replica.outstanding_tokens -= self._prompt + self._output - output
            self._prompt, self._output = 0, output
        elif type(event) is Started:
            prompt = max(event.prompt_tokens - event.cached_tokens, 0)
            self._replica.outstanding_tokens += prompt - self._prompt
            self._prompt = prompt

    def release(self) -> None:
        """The request is over."""
        self._replica.requests -= 1
        self._replica.outstanding_tokens -= self._prompt + self._output
        self._prompt = self._output = 0


class Pool:
    """The current replicas. Discovery replaces the set; requests choose from it."""

    def __init__(self, on_suspect: Callable[[Replica], None] = lambda _: None) -> None:
        self._replicas: dict[Endpoint, Replica] = {}
        self._turns = itertools.count(1)
        self._changed = asyncio.Event()
        self._on_suspect = on_suspect
        self.known = False  # discovery has spoken at least once

    def set_endpoints(self, endpoints: Iterable[Endpoint]) -> None:
        """What discovery found. Replicas that stay keep their state; requests on those that went run on."""
        self._replicas = {endpoint: self._replicas.get(endpoint) or Replica(endpoint) for endpoint in endpoints}
        self.known = True
        self._changed.set()

    def replicas(self) -> Collection[Replica]:
        """Every routable replica."""
        return self._replicas.values()

    def has(self, replica: Replica) -> bool:
        """Whether discovery still names it."""
        return self._replicas.get(replica.endpoint) is replica

    def choose(self, tried: Collection[Replica]) -> Replica | None:
        """The replica for the next try; never one of `tried`."""
        chosen = least_outstanding.choose(r for r in self._replicas.values() if r not in tried)
        if chosen is not None:
            chosen.last_chosen = next(self._turns)
        return chosen

    async def wait(self, timeout_s: float) -> None:
        """Until there is a replica, `timeout_s` at most."""
        try:
            async with asyncio.timeout(timeout_s):
                while not self._replicas:
                    self._changed.clear()
                    await self._changed.wait()
        except TimeoutError:
            pass

    def mark_suspect(self, replica: Replica) -> None:
        """It failed: others are preferred until it answers `/ready` again."""
        if not replica.suspect:
            replica.suspect = True
            self._on_suspect(replica)
