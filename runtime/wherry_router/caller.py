"""Who sent a request: what admission and limits go by."""

import msgspec

MOST = 10**12  # far below where Redis' numbers become inexact


class LimitSet(msgspec.Struct, frozen=True, kw_only=True, rename="camel", forbid_unknown_fields=True):
    """How much may be asked for; 0: as much as there is.

    Attributes:
        requests_per_minute: requests begun in any 60 s.
        tokens_per_minute: tokens of prompts and answers of the requests begun in any 60 s.
        concurrent: requests at a time.
    """

    requests_per_minute: int = 0
    tokens_per_minute: int = 0
    concurrent: int = 0

    def __post_init__(self) -> None:
        parts = (self.requests_per_minute, self.tokens_per_minute, self.concurrent)
        if min(parts) < 0 or max(parts) > MOST:
            raise ValueError(f"a limit must not be below 0, nor above {MOST}")

    def __bool__(self) -> bool:
        return bool(self.requests_per_minute or self.tokens_per_minute or self.concurrent)


UNLIMITED = LimitSet()


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Known once the request's credentials are checked, before its body is read.

    Attributes:
        tenant: whom its tokens are counted for, and whose prompts may share cached prefixes; empty where the router
            asks nobody who they are.
        key: the name of the key that it came with, never the key itself.
        weight: its tenant's share of the replicas beside other tenants'.
        priority_class: what its requests are queued as unless they ask for less; empty for the default class.
        limits: the key's own; None: those that the router has for every key.
    """

    tenant: str = ""
    key: str = ""
    weight: float = 1.0
    priority_class: str = ""
    limits: LimitSet | None = None


ANYBODY = Caller()
