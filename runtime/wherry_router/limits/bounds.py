"""What is counted against what. Pure."""

import msgspec

from wherry_router.caller import UNLIMITED, Caller, LimitSet

# A request counts in the second in which it began and in the 60 after it: never less than 60 s, never more than 61.
WINDOW_S = 60


class Bound(msgspec.Struct, frozen=True):
    """One limit's holder: `scope` is key, tenant or model, and `name` tells which."""

    scope: str
    name: str
    limits: LimitSet


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Limits of the router: of each key that has none of its own, of each tenant, and of all requests together."""

    per_key: LimitSet = UNLIMITED
    per_tenant: LimitSet = UNLIMITED
    total: LimitSet = UNLIMITED

    def bounds(self, caller: Caller, model: str) -> list[Bound]:
        """What a request of `caller` is counted against."""
        own = self.per_key if caller.limits is None else caller.limits
        found = []
        if own and caller.key:
            found.append(Bound("key", caller.key, own))
        if self.per_tenant and caller.tenant:
            found.append(Bound("tenant", caller.tenant, self.per_tenant))
        if self.total:
            found.append(Bound("model", model, self.total))
        return found


class Standing(msgspec.Struct, frozen=True):
    """Where a bound stands: what is used, and seconds until nothing of it counts any more."""

    requests: int
    requests_reset_s: int
    tokens: int
    tokens_reset_s: int


class Outcome(msgspec.Struct, frozen=True):
    """What became of a reservation. `refused`: which bound is in the way, or -1; `what` of it; and seconds until there
    is room. `standings`: one for each bound, this request included if it was granted."""

    standings: list[Standing]
    refused: int = -1
    what: str = ""
    wait_s: int = 0


GRANTED = Outcome([])


def share(limits: LimitSet, routers: int) -> LimitSet:
    """One router's part where each counts for itself. A limit never becomes none: 1 at least."""
    if routers == 1:
        return limits
    parts = (limits.requests_per_minute, limits.tokens_per_minute, limits.concurrent)
    requests, tokens, concurrent = (max(part // routers, 1) if part else 0 for part in parts)
    return LimitSet(requests_per_minute=requests, tokens_per_minute=tokens, concurrent=concurrent)
