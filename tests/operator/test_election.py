"""Leader election over a played API server, with a clock that the test holds."""

from typing import Any

import pytest

from wherry_operator.cluster.client import ApiError, Unavailable
from wherry_operator.cluster.election import LEASE_DURATION_S, RENEW_DEADLINE_S, Election


class FakeApi:
    """One lease, with optimistic locking like the API server's."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.version = 0
        self.down = False

    async def get(self, kind: str, namespace: str, name: str) -> dict[str, Any] | None:
        if self.down:
            raise Unavailable("down")
        return self.lease and {**self.lease, "spec": dict(self.lease["spec"]), "version": self.version}

    async def request(self, method: str, path: str, *, body: dict[str, Any]) -> dict[str, Any]:
        if self.down:
            raise Unavailable("down")
        if (method == "POST") != (self.lease is None) or body.get("version", self.version) != self.version:
            raise ApiError(409, "Conflict", "changed")
        self.version += 1
        self.lease = body
        return body


class Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def api() -> FakeApi:
    return FakeApi()


def candidate(api: Any, clock: Clock, name: str) -> Election:
    return Election(api, "default", "lease", name, clock)


async def attempt(election: Election) -> bool:
    return await election._try()


async def test_the_first_leads_and_the_second_waits(api: FakeApi, clock: Clock) -> None:
    a, b = candidate(api, clock, "a"), candidate(api, clock, "b")
    assert not a.leading()
    assert await attempt(a)
    assert not await attempt(b)
    assert (a.leading(), b.leading()) == (True, False)


async def test_there_is_a_gap_between_two_leaders(api: FakeApi, clock: Clock) -> None:
    a, b = candidate(api, clock, "a"), candidate(api, clock, "b")
    await attempt(a)
    await attempt(b)
    clock.now += RENEW_DEADLINE_S
    assert not a.leading(), "it must stop before anyone else may begin"
    assert not await attempt(b)
    clock.now += LEASE_DURATION_S - RENEW_DEADLINE_S
    assert await attempt(b)
    assert not await attempt(a)
    assert not a.leading()


async def test_a_renewal_that_fails_is_no_renewal(api: FakeApi, clock: Clock) -> None:
    a = candidate(api, clock, "a")
    await attempt(a)
    api.down = True
    clock.now += RENEW_DEADLINE_S - 1
    assert not await attempt(a)
    assert a.leading()
    clock.now += 1
    assert not a.leading()
    api.down = False
    assert await attempt(a), "its own lease can be taken up again"
    assert a.leading()


async def test_a_lease_that_is_given_up_is_taken_soon(api: FakeApi, clock: Clock) -> None:
    a, b = candidate(api, clock, "a"), candidate(api, clock, "b")
    await attempt(a)
    await a.release()
    assert not a.leading()
    assert await attempt(b)


async def test_of_two_at_once_one_wins(api: FakeApi, clock: Clock) -> None:
    a, b = candidate(api, clock, "a"), candidate(api, clock, "b")
    await attempt(a)
    await a.release()
    stale = await api.get("Lease", "default", "lease")
    assert await attempt(b)
    with pytest.raises(ApiError):
        await api.request("PUT", "", body=stale or {})


async def test_clocks_that_differ_do_not_matter(api: FakeApi, clock: Clock) -> None:
    a, b = candidate(api, clock, "a"), candidate(api, Clock(), "b")
    await attempt(a)
    assert api.lease is not None
    api.lease["spec"]["renewTime"] = "1999-01-01T00:00:00.000000Z"
    assert not await attempt(b), "the holder's clock is behind, its lease is still fresh to us"
