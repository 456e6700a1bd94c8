"""Who sent a request: what admission and limits go by."""

import msgspec


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """Known once the request's credentials are checked, before its body is read.

    Attributes:
        tenant: whom its tokens are counted for, and whose prompts may share cached prefixes; empty where the router
            asks nobody who they are.
        key: the name of the key that it came with, never the key itself.
        weight: its tenant's share of the replicas beside other tenants'.
        priority_class: what its requests are queued as unless they ask for less; empty for the default class.
    """

    tenant: str = ""
    key: str = ""
    weight: float = 1.0
    priority_class: str = ""


ANYBODY = Caller()
