"""What a router tells whoever has the worker token: `GET /internal/replicas` and `GET /internal/usage`.

The operator asks every router before it takes a pod away: a pod is free once each router reports nothing in flight
there, or does not know it.
"""

from typing import Literal

import msgspec

PATH = "/internal/replicas"
USAGE_PATH = "/internal/usage"

ReplicaState = Literal["routable", "draining", "suspect"]


class ReplicaReport(msgspec.Struct, kw_only=True):
    """One replica. `name`: "pod/uid", of the group's rank 0. `in_flight`: requests that this router has running there.

    `draining`: no new request goes there; also what discovery no longer names while answers still run on it.
    `suspect`: it failed lately, so others are preferred. `routable`: none of these.
    """

    name: str
    state: ReplicaState
    in_flight: int


class RouterReport(msgspec.Struct, kw_only=True):
    """All replicas of one router. `draining`: the router itself is shutting down and takes no new client. `queued`:
    requests that wait in it for a replica."""

    replicas: list[ReplicaReport]
    draining: bool
    queued: int = 0


class TenantUsage(msgspec.Struct, kw_only=True):
    """What a tenant has used of one router: requests that have ended, and their tokens. `cached_tokens`: those of its
    prompts that were in the cache."""

    tenant: str
    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0


class UsageReport(msgspec.Struct, kw_only=True):
    """All tenants since the router started: `since`, in Unix seconds. Those above 10,000 are counted as `(other)`."""

    since: float
    tenants: list[TenantUsage]
