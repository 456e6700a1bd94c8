"""The validator: every field that OpenAI documents is known; no input ends in anything but a request or a 400."""

import json
from typing import Any, get_type_hints

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openai.types import completion_create_params as text_params
from openai.types.chat import completion_create_params as chat_params

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.openai.requests import ChatCompletionRequest, CompletionRequest, parse
from wherry_protocol.openai.translate import to_execute
from wherry_protocol.worker import ExecuteRequest

CHAT = {"model": "m", "messages": [{"role": "user", "content": "hi"}]}
TEXT = {"model": "m", "prompt": "hi"}


@pytest.mark.parametrize(
    "kind, theirs",
    [
        (ChatCompletionRequest, chat_params.CompletionCreateParamsStreaming),
        (CompletionRequest, text_params.CompletionCreateParamsStreaming),
    ],
)
def test_every_documented_field_is_known(kind: Any, theirs: Any) -> None:
    assert set(get_type_hints(theirs)) <= set(kind.model_fields)


def test_defaults() -> None:
    (chat,) = to_execute(parse(ChatCompletionRequest, json.dumps(CHAT).encode()), "id")
    assert chat.sampling == ExecuteRequest(id="", model="", prompt=chat.prompt).sampling
    assert chat.id == "id-0"
    (text,) = to_execute(parse(CompletionRequest, json.dumps(TEXT).encode()), "id")
    assert text.sampling.max_tokens == 16


def test_seeds_of_choices_follow_one_another() -> None:
    request = parse(CompletionRequest, json.dumps(TEXT | {"prompt": ["a", "b"], "n": 2, "seed": 2**63 - 1}).encode())
    generations = to_execute(request, "id")
    assert [g.prompt.text for g in generations] == ["a", "a", "b", "b"]
    assert [g.sampling.seed for g in generations] == [2**63 - 1, 0, 2**63 - 1, 0]


@pytest.mark.parametrize(
    "change, param",
    [
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"n": 1.5}, "n"),
        ({"n": True}, "n"),
        ({"seed": 2**64}, "seed"),
        ({"max_tokens": 2**40}, "max_tokens"),
        ({"stop": [""]}, "stop"),
        ({"stop": ["x" * 2000]}, "stop"),
        ({"stop": 5}, "stop"),
        ({"logit_bias": {"1": 101}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {str(i): 1 for i in range(301)}}, "logit_bias"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -2}, "top_k"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"stop_token_ids": list(range(65))}, "stop_token_ids"),
        ({"stream_options": {"x": 1}, "stream": True}, "stream_options.x"),
        ({"messages": [{"role": "user"}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages.0.content"),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "content": "x", "tool_calls": [{}]}]}, "messages.0"),
        ({"messages": "hi"}, "messages"),
        ({"store": True}, "store"),
        ({"store": 0}, "store"),
        ({"reasoning_effort": "high"}, "reasoning_effort"),
    ],
)
def test_refusals_name_the_field(change: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        parse(ChatCompletionRequest, json.dumps(CHAT | change).encode())
    assert (caught.value.status, caught.value.param) == (400, param)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none(number: str) -> None:
    body = json.dumps(CHAT)[:-1] + f', "temperature": {number}}}'
    with pytest.raises(ApiError):
        parse(ChatCompletionRequest, body.encode())


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(ChatCompletionRequest.model_fields)), JUNK, max_size=5))
def test_any_chat_request_is_taken_or_refused(change: dict[str, Any]) -> None:
    _try(ChatCompletionRequest, CHAT | change)


@settings(max_examples=300, deadline=None)
@given(st.dictionaries(st.sampled_from(sorted(CompletionRequest.model_fields)), JUNK, max_size=5))
def test_any_completion_request_is_taken_or_refused(change: dict[str, Any]) -> None:
    _try(CompletionRequest, TEXT | change)


def _try(kind: Any, value: dict[str, Any]) -> None:
    try:
        request = parse(kind, json.dumps(value).encode())
    except ApiError as refused:
        status, told = refused.status, json.loads(refused.body())["error"]["message"]
        assert status == 400
        assert told
    else:
        for generation in to_execute(request, "id"):
            assert msgspec.json.decode(msgspec.json.encode(generation), type=ExecuteRequest) == generation
