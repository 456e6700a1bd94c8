"""What a request may ask for. Everything is checked here, before the step loop ever sees it."""

import math
from typing import NoReturn

from wherry_protocol.worker import ExecuteRequest, Prompt, SamplingParams

MAX_STOP_STRINGS = 16
MAX_STOP_LENGTH = 1000
MAX_LOGPROBS = 20
MAX_LOGIT_BIASES = 1024
MAX_STOP_IDS = 256
MAX_CACHE_SALT = 128
MAX_CREATED = 253_402_214_400  # the last day of the year 9999, where calendars of programs end


class RequestError(Exception):
    """A request that cannot start. `status` is HTTP's, `code` for programs, `param` the field to blame."""

    def __init__(
        self, code: str, message: str, *, status: int = 400, param: str | None = None, retryable: bool = False
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.status = status
        self.param = param
        self.retryable = retryable


def _refuse(param: str, message: str) -> NoReturn:
    raise RequestError("invalid_value", f"{param}: {message}", param=param)


def _number(params: SamplingParams, name: str, low: float, high: float, *, above: bool = False) -> None:
    """`above`: `low` itself is out of range."""
    value = getattr(params, name)
    if not isinstance(value, int | float) or isinstance(value, bool) or not math.isfinite(value):
        _refuse(name, "must be a finite number")
    if value < low or value > high or (above and value == low):
        _refuse(name, f"must be {'above' if above else 'at least'} {low:g} and at most {high:g}, not {value:g}")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        _refuse(name, "must be an integer")
    if not low <= value <= high:
        _refuse(name, f"must be at least {low} and at most {high}, not {value}")


def check_sampling(params: SamplingParams, vocab_size: int) -> None:
    """Raises RequestError (invalid_value, naming the field) if a field is out of range or of another type."""
    _number(params, "temperature", 0, 100)
    _number(params, "top_p", 0, 1, above=True)
    _number(params, "min_p", 0, 1)
    _number(params, "presence_penalty", -2, 2)
    _number(params, "frequency_penalty", -2, 2)
    _number(params, "repetition_penalty", 0, 100, above=True)
    _integer("top_k", params.top_k, 0, 1 << 31)
    _integer("min_tokens", params.min_tokens, 0, 1 << 31)
    if params.max_tokens is not None:
        _integer("max_tokens", params.max_tokens, 1, 1 << 31)
        if params.min_tokens > params.max_tokens:
            _refuse("min_tokens", f"{params.min_tokens} is more than max_tokens, {params.max_tokens}")
    if params.seed is not None:
        _integer("seed", params.seed, -(1 << 63), (1 << 64) - 1)
    if params.logprobs is not None:
        _integer("logprobs", params.logprobs, 0, MAX_LOGPROBS)
    _check_stops(params, vocab_size)
    if not isinstance(params.logit_bias, dict) or len(params.logit_bias) > MAX_LOGIT_BIASES:
        _refuse("logit_bias", f"must be an object with at most {MAX_LOGIT_BIASES} tokens")
    for token, bias in params.logit_bias.items():
        _integer("logit_bias", token, 0, vocab_size - 1)
        if not isinstance(bias, int | float) or isinstance(bias, bool) or not -100 <= bias <= 100:
            _refuse("logit_bias", f"the bias of token {token} must be a number between -100 and 100")


def _check_stops(params: SamplingParams, vocab_size: int) -> None:
    if not isinstance(params.stop, list) or len(params.stop) > MAX_STOP_STRINGS:
        _refuse("stop", f"must be a list of at most {MAX_STOP_STRINGS} strings")
    for stop in params.stop:
        if not isinstance(stop, str) or not 1 <= len(stop) <= MAX_STOP_LENGTH:
            _refuse("stop", f"each must be a string of 1 to {MAX_STOP_LENGTH} characters")
    if not isinstance(params.stop_token_ids, list) or len(params.stop_token_ids) > MAX_STOP_IDS:
        _refuse("stop_token_ids", f"must be a list of at most {MAX_STOP_IDS} token ids")
    for token in params.stop_token_ids:
        _integer("stop_token_ids", token, 0, vocab_size - 1)


def check_prompt(prompt: Prompt) -> None:
    """Raises RequestError unless exactly one of text, token_ids and messages is there."""
    given = [n for n in ("text", "token_ids", "messages") if getattr(prompt, n) is not None]
    if len(given) != 1:
        found = " and ".join(given) or "none of them"
        raise RequestError(
            "invalid_prompt", f"give exactly one of text, token_ids and messages, not {found}", param="prompt"
        )


def check_text(text: str) -> None:
    """Raises RequestError for text that is not Unicode: JSON can carry half of a surrogate pair, UTF-8 cannot."""
    try:
        text.encode()
    except UnicodeEncodeError as e:
        raise RequestError(
            "invalid_prompt", f"character {e.start} of the prompt is half of a surrogate pair", param="prompt"
        ) from None


def check_tokens(tokens: list[int], vocab_size: int, max_model_len: int) -> None:
    """Raises RequestError if a tokenized prompt is empty, too long or has ids that the model does not know."""
    if not tokens:
        raise RequestError("empty_prompt", "the prompt is empty; it needs at least one token", param="prompt")
    if len(tokens) >= max_model_len:
        raise RequestError(
            "context_length_exceeded",
            f"the prompt has {len(tokens)} tokens and the model's context is {max_model_len} tokens, "
            "of which the answer needs at least one; shorten the prompt",
            param="prompt",
        )
    for token in tokens:
        check_token_id(token, vocab_size, code="invalid_token", param="prompt")


def check_token_id(token: object, vocab_size: int, *, code: str, param: str) -> None:
    """Raises RequestError (`code`) if the model does not know it."""
    if not isinstance(token, int) or isinstance(token, bool) or not 0 <= token < vocab_size:
        raise RequestError(code, f"token id {token} is not in the vocabulary, 0 to {vocab_size - 1}", param=param)


def check_work(request_id: str, wanted: str, priority: int, model: str) -> None:
    """Raises RequestError for another model, or an id or a priority that cannot be used."""
    if wanted != model:
        raise RequestError(
            "model_not_found", f"model {wanted!r} is not served here; {model!r} is", status=404, param="model"
        )
    if not isinstance(request_id, str) or not 1 <= len(request_id) <= 512:
        _refuse("id", "must be a string of 1 to 512 characters")
    _integer("priority", priority, -(1 << 31), 1 << 31)


def check_identity(request: ExecuteRequest, model: str) -> None:
    """Raises RequestError for another model, or an id, a priority or a salt that cannot be used."""
    check_work(request.id, request.model, request.priority, model)
    _integer("created", request.created, 0, MAX_CREATED)
    if len(request.cache_salt) > MAX_CACHE_SALT or not request.cache_salt.isascii():
        _refuse("cache_salt", f"must be ASCII of at most {MAX_CACHE_SALT} characters")
