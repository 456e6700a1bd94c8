"""The worker API: what the router (or `wherry serve`) asks of an engine, and what the engine answers.

`POST /execute` takes an `ExecuteRequest` as JSON and answers with server-sent events, one per `Event` below; the SSE
`event:` field is the type's tag and `data:` its JSON:

    started, token*, metrics, (end | error)

`POST /embed` takes an `EmbedRequest`, for models that turn texts into vectors, and answers in the same way:

    started, embedding*, metrics, (end | error)

Each of the two is refused with 400 by models of the other kind.
The answer's headers come once the request is in the engine's queue, and comments wherever it pauses (see `sse`).
A request that cannot start gets an HTTP status with an `ErrorEvent` as its JSON body and no stream: 400 (the request),
401 (the token), 404 (the model), 429 (the queue is full, with `Retry-After`), 503 (not ready or draining).
`POST /cancel` takes a `CancelRequest`; `GET /load` answers a `LoadReport`, and `GET /load/watch` a stream of
`LoadUpdate`s that ends when the worker takes no more requests; `GET /health` and `GET /ready` ask no token.
"""

from typing import Literal

import msgspec

# Tokens that an answer is taken to have while nobody knows its length.
EXPECTED_OUTPUT = 256

FinishReason = Literal["stop", "length", "cancelled"]


class ChatMessage(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One turn of a conversation. `content` is text; other parts are refused before they get here."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str
    name: str | None = None


class Prompt(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Exactly one of the three. Text is tokenized with special tokens; messages go through the chat template."""

    text: str | None = None
    token_ids: list[int] | None = None
    messages: list[ChatMessage] | None = None


class SamplingParams(msgspec.Struct, kw_only=True, omit_defaults=True, frozen=True):
    """How tokens are drawn. `temperature` 0 is greedy. The router checks ranges before they get here."""

    max_tokens: int | None = None  # None: as many as the context has room for
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0  # 0: off
    top_p: float = 1.0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None  # None: the engine draws one per request
    stop: list[str] = []
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    logit_bias: dict[int, float] = {}
    logprobs: int | None = None  # None: none; k: the sampled token's and the k most likely ones'


class Resume(msgspec.Struct, kw_only=True, omit_defaults=True):
    """An answer that another worker began. This one goes on after `token_ids`, and gives the tokens and the text that
    the first one would have given; `seed` and `prompt_digest` are those of its `Started`."""

    token_ids: list[int]  # every token of the answer so far, in order
    seed: int
    prompt_digest: str = ""  # empty: not compared


class ExecuteRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One generation. `id` is the correlation id, unique among the worker's live requests.

    With `resume`, prompt and sampling are those of the first time, `max_tokens` counts the resumed tokens too, and the
    first `Token.index` is their number. An answer that these tokens end gets its `metrics` and `end` at once.
    """

    id: str
    model: str
    prompt: Prompt
    sampling: SamplingParams = SamplingParams()
    priority: int = 0  # higher runs first; ties by arrival
    created: int = 0  # Unix time in seconds, for chat templates that write a date; 0: the worker's own clock
    resume: Resume | None = None
    cache_salt: str = ""  # requests with different salts share no cached prefix; ASCII, 128 characters at most


class EmbedRequest(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Texts that become vectors. `id` is unique among the worker's live requests."""

    id: str
    model: str
    inputs: list[str | list[int]]  # text is tokenized with special tokens, token ids are taken as they are
    dimensions: int | None = None  # None: as many as the model has
    truncate: int | None = None  # tokens of each text at most; -1: as many as the model takes; None: longer is refused
    priority: int = 0  # higher runs first; those of one priority take turns


class CancelRequest(msgspec.Struct):
    """Ends the request with this id; unknown ids are fine (it may have just ended)."""

    id: str


class TokenLogprob(msgspec.Struct, omit_defaults=True):
    """A token's natural-log probability after temperature-free softmax, its text and its bytes."""

    id: int
    logprob: float
    text: str
    bytes: list[int]


class PositionLogprobs(msgspec.Struct):
    """The sampled token, and the most likely ones in descending order."""

    sampled: TokenLogprob
    top: list[TokenLogprob]


class Started(msgspec.Struct, tag_field="event", tag="started"):
    """The request left the queue. `cached_tokens` of the prompt came from the prefix cache. `prompt_digest` names the
    prompt's tokens: two workers that disagree about them cannot continue one another's answers. `version` names the
    model and settings (`engine_config.fingerprint`)."""

    id: str
    prompt_tokens: int
    cached_tokens: int
    seed: int
    prompt_digest: str = ""
    version: str = ""  # empty: not told


class Token(msgspec.Struct, tag_field="event", tag="token", omit_defaults=True):
    """One or more new tokens. `index` is the first one's place in the answer. `text` is what became final with them:
    whole characters only, held back while a stop string may still match, so it may be empty."""

    index: int
    ids: list[int]
    text: str = ""
    logprobs: list[PositionLogprobs] = []


class Metrics(msgspec.Struct, tag_field="event", tag="metrics"):
    """Sent once before `end`. Times in seconds."""

    queue_s: float
    prefill_s: float
    decode_s: float


class End(msgspec.Struct, tag_field="event", tag="end", omit_defaults=True):
    """The answer is whole. `stop_reason` is the stop string or stop token id that matched, if one did."""

    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    stop_reason: str | int | None = None


class ErrorEvent(msgspec.Struct, tag_field="event", tag="error", omit_defaults=True):
    """What went wrong, for a person. `retryable`: another replica (or a later try) may answer it."""

    code: str
    message: str
    retryable: bool = False
    param: str | None = None


class Embedding(msgspec.Struct, tag_field="event", tag="embedding"):
    """The vector of the input at `index`; they come in order. `vector`: float32, little-endian (base64 in JSON)."""

    index: int
    vector: bytes


Event = Started | Token | Embedding | Metrics | End | ErrorEvent


class LoadReport(msgspec.Struct, kw_only=True):
    """An engine's load now. Token counts are tokens of KV cache."""

    model: str
    ready: bool
    running: int
    waiting: int
    max_running: int
    kv_tokens_used: int
    kv_tokens_total: int
    prompt_tokens_total: int
    completion_tokens_total: int
    prefix_hit_tokens_total: int
    preemptions_total: int
    steps_total: int
    heartbeat_age_s: float
    prefix_queried_tokens_total: int = 0  # prompt tokens looked up in the prefix cache
    draft_tokens_total: int = 0  # guesses of speculative decoding that were checked
    accepted_tokens_total: int = 0  # of these, those that held
    tokens_owed: int = 0  # of live requests: what of prompts is to be computed, and of answers expected


class PrefixChange(msgspec.Struct, omit_defaults=True):
    """What changed of the prefixes that a worker has cached: keys of `wherry_protocol.prefix`, packed. `whole`: the
    worker has those of `added` and no others, whatever was told before."""

    whole: bool
    added: bytes = b""
    removed: bytes = b""


class LoadUpdate(msgspec.Struct, kw_only=True, omit_defaults=True):
    """One event of `GET /load/watch`. The first one of a stream has all prefixes, unless the worker caches none."""

    load: LoadReport
    prefixes: PrefixChange | None = None  # None: no change
