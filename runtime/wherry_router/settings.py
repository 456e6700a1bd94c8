"""What a router is told at its start, and the bounds it keeps."""

import msgspec


class Limits(msgspec.Struct, kw_only=True, frozen=True):
    """Bounds. Whatever is over one gets an answer that says so, never a hang."""

    max_body_bytes: int = 8 * 1024 * 1024
    max_concurrent: int = 1024
    body_timeout_s: float = 30.0
    # From the request to its first token, all tries together.
    first_token_timeout_s: float = 300.0
    # How long a request waits for a replica when there is none.
    no_replica_wait_s: float = 5.0
    max_tries: int = 4
    # Silence after which a worker that owes tokens is asked whether it is alive, and how long it has to answer.
    stall_s: float = 2.0
    probe_timeout_s: float = 1.0
    connect_timeout_s: float = 2.0
