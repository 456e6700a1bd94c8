"""What a router is told at its start, and the bounds it keeps."""

import msgspec


class Limits(msgspec.Struct, kw_only=True, frozen=True):
    """Bounds. Whatever is over one gets an answer that says so, never a hang."""

    max_body_bytes: int = 8 * 1024 * 1024
    # More than admission lets wait and workers run, so that it is admission that chooses whom to refuse.
    max_concurrent: int = 4096
    max_connections: int = 16384
    head_timeout_s: float = 30.0
    body_timeout_s: float = 30.0
    unread_timeout_s: float = 120.0
    # From the request to its first token, all tries together.
    first_token_timeout_s: float = 300.0
    # How long a request waits for a replica when there is none.
    no_replica_wait_s: float = 30.0
    max_tries: int = 4
    # Silence after which a worker that owes tokens is asked whether it is alive, and how long it has to answer. Asking
    # costs next to nothing. Both and the time of one prefill are what a frozen worker's clients wait, and those of two
    # that freeze one after the other wait twice as long: under 2 s, too.
    stall_s: float = 0.3
    probe_timeout_s: float = 0.4
    # Answers that lost their worker go on elsewhere. How long one waits for a replica, and how many tries in a row may
    # bring no new token: a request that ends every worker that it comes to must not go round for ever.
    resume: bool = True
    resume_wait_s: float = 120.0
    max_resume_tries: int = 4
    connect_timeout_s: float = 2.0
    # Bulkhead: above what a worker takes at its defaults (64 running, 256 queued), so that its own bound speaks first.
    max_per_replica: int = 512
    # Breaker: failed requests in a row; seconds after which it lets a request try though no probe succeeded.
    breaker_faults: int = 3
    breaker_max_open_s: float = 30.0
    # Outlier ejection: share of the pool at most, seconds of the first time, and what is too much.
    eject_share: float = 0.34
    eject_s: float = 15.0
    eject_fault_rate: float = 0.3
    eject_ttft_factor: float = 5.0
    # Retries: share of the requests of ten seconds, and a few a second.
    retry_share: float = 0.2
    retry_min_per_s: float = 10.0
    # Share of replicas that look bad, over which all of them are used again.
    panic_share: float = 0.67
