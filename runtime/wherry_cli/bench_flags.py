"""The options of `wherry bench serve`, and what is wrong with them."""

from pathlib import Path
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

Api = Literal["chat", "completions"]
Pattern = Literal["poisson", "constant", "burst"]
Unit = Literal["auto", "s", "ms"]
Workload = Literal["random", "shared-prefix", "multi-turn", "file", "trace"]
LEAST = 1e-6


class Failure(Exception):
    """Something the user can mend. The message says what and how."""


class ServeFlags(msgspec.Struct, kw_only=True):
    """One field for each option."""

    url: Annotated[str, Meta(description="the server, with or without /v1")] = "http://127.0.0.1:8080"
    model: Annotated[str, Meta(description="model to ask for; default: the first that the server names")] = ""
    api: Annotated[Api, Meta(description="which of the two APIs is asked")] = "chat"
    api_key_env: Annotated[str, Meta(description="variable that holds the API key")] = "WHERRY_API_KEY"
    workload: Annotated[
        Workload, Meta(description="what is asked: made up (the first three), prompts from --file, or a recorded trace")
    ] = "random"
    arrival: Annotated[Pattern, Meta(description="how arrivals are spaced; a trace has its own")] = "poisson"
    rate: Annotated[
        float, Meta(description="arrivals a second; of conversations, where there are turns", ge=LEAST, le=1e6)
    ] = 1.0
    burst: Annotated[int, Meta(description="arrivals at a time with --arrival burst", ge=1)] = 10
    requests: Annotated[
        int | None, Meta(description="requests in all; 100 if there is neither this nor --duration nor a trace", ge=1)
    ] = None
    duration: Annotated[float | None, Meta(description="seconds for which requests are sent", ge=0)] = None
    input_tokens: Annotated[int, Meta(description="tokens of each request's own text", ge=1)] = 512
    output_tokens: Annotated[int, Meta(description="tokens of each answer", ge=1)] = 128
    length_spread: Annotated[
        float, Meta(description="lengths scatter evenly by this share of themselves", ge=0, le=1)
    ] = 0.0
    prefixes: Annotated[int, Meta(description="system prompts that requests share", ge=1)] = 8
    prefix_tokens: Annotated[int, Meta(description="tokens of each of these", ge=1)] = 2048
    prefix_skew: Annotated[
        float, Meta(description="the n-th of these is n^-skew times as popular as the first; 0: all alike", ge=0)
    ] = 0.0
    turns: Annotated[int, Meta(description="requests of a conversation with --workload multi-turn", ge=1)] = 5
    think: Annotated[float, Meta(description="mean seconds from an answer to the next turn", ge=0)] = 1.0
    file: Annotated[Path | None, Meta(description="prompts (a line each), or a trace (CSV or JSONL)")] = None
    trace_unit: Annotated[
        Unit, Meta(description="unit of a trace's numeric timestamps; auto: ms in JSONL, s in CSV")
    ] = "auto"
    trace_speed: Annotated[float, Meta(description="how many times as fast a trace is replayed", ge=LEAST, le=1e6)] = (
        1.0
    )
    slo_ttft_ms: Annotated[
        float | None, Meta(description="milliseconds to the first token that a good answer keeps", ge=0)
    ] = None
    slo_itl_ms: Annotated[
        float | None, Meta(description="milliseconds per token, on its average, that a good answer keeps", ge=0)
    ] = None
    ignore_eos: Annotated[
        bool, Meta(description="ask for answers of full length; servers that refuse the field need --no-ignore-eos")
    ] = True
    timeout: Annotated[float, Meta(description="seconds after which a request counts as failed", ge=0.1)] = 600
    seed: Annotated[int, Meta(description="the same seed sends the same requests at the same times")] = 0
    json: Annotated[Path | None, Meta(description="write figures and every request to this file")] = None
    plot: Annotated[Path | None, Meta(description="draw latency over time into this SVG file")] = None
