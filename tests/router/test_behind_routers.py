"""Requests as other routers pass them on: they write fields of their own engines into each."""

import json
from typing import Any

import pytest

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.openai.requests import ChatCompletionRequest, CompletionRequest, parse

# What vllm-router 0.1.17 and sglang-router 0.3.2 make of a plain chat request.
VLLM_ROUTER = {
    "logprobs": False,
    "no_stop_trim": False,
    "continue_final_message": False,
    "skip_special_tokens": True,
    "separate_reasoning": True,
    "stream_reasoning": True,
    "return_hidden_states": False,
    "include_reasoning": True,
}
SGLANG_ROUTER = {name: value for name, value in VLLM_ROUTER.items() if name != "include_reasoning"}
CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
TEXT = {"model": "m", "prompt": "x"}


@pytest.mark.parametrize("added", [VLLM_ROUTER, SGLANG_ROUTER])
def test_what_they_add_is_accepted(added: dict[str, Any]) -> None:
    assert parse(ChatCompletionRequest, json.dumps(CHAT | added).encode()).messages[0].content == "x"
    fields = {name: value for name, value in added.items() if name != "logprobs"}
    assert parse(CompletionRequest, json.dumps(TEXT | fields).encode()).prompt == ["x"]


@pytest.mark.parametrize(
    "wish",
    [
        {"no_stop_trim": True},
        {"continue_final_message": True},
        {"skip_special_tokens": False},
        {"return_hidden_states": True},
        {"separate_reasoning": "yes"},
    ],
)
def test_what_a_client_wishes_by_them_is_refused(wish: dict[str, Any]) -> None:
    for kind, body in ((ChatCompletionRequest, CHAT), (CompletionRequest, TEXT)):
        with pytest.raises(ApiError) as refused:
            parse(kind, json.dumps(body | wish).encode())
        assert (refused.value.status, refused.value.param) == (400, next(iter(wish)))
