"""Chat completions and completions as OpenAI defines them, with the extensions that engines of this kind share.

Reference: https://platform.openai.com/docs/api-reference. Every documented field is known here. A field that Wherry
does not support is refused unless it holds a value that changes nothing, so no wish of a client is dropped in
silence; an unknown field is refused too. Every door (REST now, others later) goes through `parse`.
"""

import re
from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema, model_validator

from wherry_protocol.openai.errors import ApiError, invalid

MAX_CHOICES = 16
MAX_MESSAGES = 10_000
MAX_METADATA = 16
# Beyond so many mistakes they are counted and not told one by one: a body may hold a million of them.
_MAX_TOLD = 100
MAX_STOPS = 4
MAX_STOP_CHARS = 1000
MAX_LOGIT_BIAS = 300
INT32 = 2**31 - 1
_INT64 = 2**63 - 1
# A token id as a key of an object. No longer: leading zeros would hide numbers that no one has room for.
_TOKEN = re.compile(r"[0-9]{1,10}")


def _stops(value: Any) -> list[str]:
    stops = [value] if isinstance(value, str) else value
    if stops is None:
        return []
    if not isinstance(stops, list) or len(stops) > MAX_STOPS or not all(isinstance(stop, str) for stop in stops):
        raise ValueError(f"must be a string or up to {MAX_STOPS} strings")
    if not all(0 < len(stop) <= MAX_STOP_CHARS for stop in stops):
        raise ValueError(f"each stop string has 1 to {MAX_STOP_CHARS} characters")
    return stops


def _biases(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, dict) or len(value) > MAX_LOGIT_BIAS:
        raise ValueError(f"must be an object of up to {MAX_LOGIT_BIAS} token ids and biases")
    biases = {}
    for token, bias in value.items():
        if not _TOKEN.fullmatch(str(token)) or int(token) > INT32:
            raise ValueError("its keys must be token ids")
        if isinstance(bias, bool) or not isinstance(bias, int | float) or not -100 <= bias <= 100:
            raise ValueError("its values must be numbers from -100 to 100")
        biases[int(token)] = float(bias)
    return biases


def is_token_ids(value: Any) -> bool:
    """Whether it is a list of nothing else."""
    return isinstance(value, list) and all(type(token) is int and 0 <= token <= INT32 for token in value)


def _prompts(value: Any) -> list[str | list[int]]:
    """Every shape of `prompt` as a list of texts or token id lists."""
    if isinstance(value, str) or (is_token_ids(value) and value):
        return [value]
    if isinstance(value, list) and value and all(isinstance(part, str) or is_token_ids(part) for part in value):
        if len(value) > MAX_CHOICES:
            raise ValueError(f"has {len(value)} prompts; at most {MAX_CHOICES} go into one request")
        return value
    raise ValueError("must be a string, a list of strings, a list of token ids or a list of those")


def _text(value: Any) -> str | None:
    """A message's content as one text: parts of type text are joined, other parts are refused."""
    if value is None or isinstance(value, str):
        return value
    if not isinstance(value, list):
        raise ValueError("must be a string or a list of content parts")  # noqa: TRY004 - pydantic reads ValueError
    texts = []
    for part in value:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text":
            raise ValueError(f"parts of type {str(kind)[:40]!r} are not supported; this model reads text")
        if not isinstance(part.get("text"), str):
            raise ValueError("a text part needs a string in `text`")  # noqa: TRY004
        texts.append(part["text"])
    return "".join(texts)


def _schema(*kinds: dict[str, Any]) -> WithJsonSchema:
    return WithJsonSchema({"anyOf": [*kinds, {"type": "null"}]})


STRING: dict[str, Any] = {"type": "string"}
STRINGS: dict[str, Any] = {"type": "array", "items": STRING}
IDS: dict[str, Any] = {"type": "array", "items": {"type": "integer", "minimum": 0}}

Stops = Annotated[list[str], BeforeValidator(_stops), _schema(STRING, STRINGS | {"maxItems": MAX_STOPS})]
Biases = Annotated[dict[int, float], BeforeValidator(_biases), _schema({"type": "object"})]
Prompts = Annotated[
    list[str | list[int]],
    BeforeValidator(_prompts),
    WithJsonSchema({"anyOf": [STRING, STRINGS, IDS, {"type": "array", "items": IDS}]}),
]
Content = Annotated[str | None, BeforeValidator(_text), _schema(STRING, {"type": "array", "items": {"type": "object"}})]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Unsupported = Any


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class Checked(_Strict):
    """A request's body."""

    def check(self) -> None:
        """The rules that join several fields.

        Raises:
            ApiError: with status 400, naming the field.
        """


class StreamOptions(_Strict):
    """What a stream holds besides the answer."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None


_NOT_IN_MESSAGES = frozenset({"refusal", "audio", "annotations", "tool_calls", "function_call"})


class Message(_Strict):
    """One turn. Fields that answers carry are accepted where they are empty, so that an answer can be sent back."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content = None
    name: Annotated[str, Field(max_length=256)] | None = None
    refusal: Unsupported = None
    audio: Unsupported = None
    annotations: Unsupported = None
    tool_calls: Unsupported = None
    function_call: Unsupported = None

    @model_validator(mode="after")
    def _only_text(self) -> "Message":
        for field in self.model_fields_set & _NOT_IN_MESSAGES:
            if getattr(self, field):
                raise ValueError(f"`{field}` is not supported")
        if self.content is None:
            raise ValueError("`content` is missing")
        return self


# What vllm-router and sglang-router write into every request that passes them, at the values that change nothing here.
_OF_ROUTERS: Mapping[str, tuple[Any, ...]] = {
    "continue_final_message": (False,),
    "include_reasoning": (False, True),
    "no_stop_trim": (False,),
    "return_hidden_states": (False,),
    "separate_reasoning": (False, True),
    "skip_special_tokens": (True,),
    "stream_reasoning": (False, True),
}


class _Generation(Checked):
    """What both kinds of request share."""

    # Fields that are known and not supported, with the values that ask for nothing.
    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = _OF_ROUTERS

    model: Annotated[str, Field(max_length=256)]
    frequency_penalty: Penalty | None = None
    logit_bias: Biases = Field(default_factory=dict)
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    presence_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-_INT64 - 1, le=_INT64)] | None = None
    stop: Stops = Field(default_factory=list)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    user: str | None = None
    # Extensions.
    top_k: Annotated[int, Field(ge=-1, le=INT32)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=10)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=INT32)] | None = None
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0, le=INT32)]], Field(max_length=64)] | None = None

    continue_final_message: Unsupported = None
    include_reasoning: Unsupported = None
    no_stop_trim: Unsupported = None
    return_hidden_states: Unsupported = None
    separate_reasoning: Unsupported = None
    skip_special_tokens: Unsupported = None
    stream_reasoning: Unsupported = None

    def limit(self) -> int | None:
        """Tokens of the answer at most; None: what the context has room for."""
        return self.max_tokens

    def check(self) -> None:
        """The rules that join several fields, and the fields that are not supported.

        Raises:
            ApiError: with status 400, naming the field.
        """
        for field in self.harmless.keys() & self.model_fields_set:
            value, allowed = getattr(self, field), self.harmless[field]
            if value is not None and not any(type(value) is type(one) and value == one for one in allowed):
                raise invalid(f"`{field}` is not supported with this value.", field, "unsupported_parameter")
        if self.stream_options is not None and not self.stream:
            raise invalid("`stream_options` needs `stream` to be true.", "stream_options")
        limit = self.limit()
        if self.min_tokens and limit is not None and self.min_tokens > limit:
            raise invalid(f"`min_tokens` is {self.min_tokens}, over the {limit} of `max_tokens`.", "min_tokens")


class ChatCompletionRequest(_Generation):
    """`POST /v1/chat/completions`."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **_OF_ROUTERS,
        "audio": (),
        "function_call": ("none", "auto"),
        "functions": ([],),
        "modalities": (["text"],),
        "moderation": (),
        "prediction": (),
        "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},),
        "service_tier": ("auto", "default"),
        "store": (False,),
        "tool_choice": ("none", "auto"),
        "tools": ([],),
        "verbosity": ("medium",),
        "web_search_options": (),
    }

    messages: Annotated[list[Message], Field(min_length=1, max_length=MAX_MESSAGES, fail_fast=True)]
    max_completion_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    # Hints about caching and abuse, of no effect here.
    metadata: Annotated[dict[str, str], Field(max_length=MAX_METADATA)] | None = None
    parallel_tool_calls: bool | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    audio: Unsupported = None
    function_call: Unsupported = None
    functions: Unsupported = None
    modalities: Unsupported = None
    moderation: Unsupported = None
    prediction: Unsupported = None
    reasoning_effort: Unsupported = None
    response_format: Unsupported = None
    service_tier: Unsupported = None
    store: Unsupported = None
    tool_choice: Unsupported = None
    tools: Unsupported = None
    verbosity: Unsupported = None
    web_search_options: Unsupported = None

    def limit(self) -> int | None:
        """`max_completion_tokens`, or its older name."""
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("`top_logprobs` needs `logprobs` to be true.", "top_logprobs")


class CompletionRequest(_Generation):
    """`POST /v1/completions`."""

    harmless: ClassVar[Mapping[str, tuple[Any, ...]]] = {**_OF_ROUTERS, "echo": (False,), "suffix": ("",)}

    prompt: Prompts
    # OpenAI's default.
    max_tokens: Annotated[int, Field(ge=1, le=INT32)] | None = 16
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    echo: Unsupported = None
    suffix: Unsupported = None

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise invalid("`best_of` is supported only where it equals `n`.", "best_of", "unsupported_parameter")
        if len(self.prompt) * (self.n or 1) > MAX_CHOICES:
            raise invalid(f"prompts times `n` may be {MAX_CHOICES} at most.", "n")


Request = ChatCompletionRequest | CompletionRequest
R = TypeVar("R", bound=Checked)


def parse(kind: type[R], body: bytes) -> R:
    """A checked request.

    Raises:
        ApiError: with status 400, naming the first field that is wrong.
    """
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        raise _explain(error) from None
    request.check()
    return request


def _explain(error: ValidationError) -> ApiError:
    if error.error_count() > _MAX_TOLD:
        return invalid(f"The request has {error.error_count()} mistakes.", None)
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    param = ".".join(str(part)[:64] for part in first["loc"]) or None
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return invalid(f"The body is not JSON: {message.removeprefix('Invalid JSON: ')}", None, "invalid_json")
    if first["type"] == "extra_forbidden":
        return invalid(f"There is no parameter `{param}`.", param, "unknown_parameter")
    if first["type"] == "missing":
        return invalid(f"`{param}` is missing.", param, "missing_required_parameter")
    return invalid(f"`{param}`: {message}" if param else message, param)
