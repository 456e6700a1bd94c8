"""What a router tells the operator of the replicas that it knows: `GET /internal/replicas`, with the worker token.

The operator asks every router before it takes a pod away: a pod is free once each router reports nothing in flight
there, or does not know it.
"""

from typing import Literal

import msgspec

PATH = "/internal/replicas"

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
