"""Requests that mean harm, to a real engine behind the router: after each of them it generates as before."""

import gc
import json
import time
import tracemalloc
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from tests.router.harness import MODEL, Process, chat

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.openai.requests import ChatCompletionRequest, parse

INT32, INT64 = 2**31 - 1, 2**63 - 1
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
PROMPT = {"model": MODEL, "prompt": "A boat"}


@pytest.fixture(scope="module")
def client(tiny_router: Process) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=tiny_router.url, timeout=60, trust_env=False) as one:
        yield one


@pytest.fixture(autouse=True)
def generates(request: pytest.FixtureRequest) -> Iterator[None]:
    """After each test that has asked the router for something."""
    yield
    if "client" in request.fixturenames:
        answer = request.getfixturevalue("client").post(CHAT, json=chat("Hello", max_tokens=2))
        assert answer.json()["usage"]["completion_tokens"] > 0


# Field, values that are taken, values that are refused. The least and the most of each, and one beyond.
FANS: list[tuple[str, str, list[Any], list[Any]]] = [
    (CHAT, "n", [1, 16], [0, -1, 17, 128, INT64, 2**64]),
    (TEXT, "n", [1, 16], [0, -1, 17, 128, INT64, 2**64]),
    (TEXT, "prompt", [["a"] * 16, [1], [[1]] * 16], [["a"] * 17, [[1]] * 17, ["a"] * 100_000, [], [[]], [-1], [2**31]]),
    (TEXT, "logprobs", [0, 20], [-1, 21, INT32, True]),
    (TEXT, "best_of", [1], [0, 2, 17, INT64]),
    (CHAT, "top_logprobs", [0, 20], [-1, 21, INT32]),
    (CHAT, "min_tokens", [0, 2], [3, -1, INT32, 2**31, INT64]),
    (TEXT, "min_tokens", [0, 2], [3, -1, INT32, 2**31, INT64]),
    (CHAT, "max_tokens", [1, INT32], [0, -1, 2**31, INT64, 2**64]),
    (CHAT, "max_completion_tokens", [1, INT32], [0, -1, 2**31, 2**64]),
    (CHAT, "stop", [[], ["x"] * 4, "x" * 1000], [["x"] * 5, ["x" * 1001], [""], ["x"] * 100_000]),
    (CHAT, "stop_token_ids", [[], [1] * 64], [[1] * 65, [-1], [2**31], [INT32], [1] * 100_000]),
    (CHAT, "logit_bias",
        [{}, {"1": 100}, dict.fromkeys(map(str, range(300)), 1)],
        [dict.fromkeys(map(str, range(301)), 1), {"1": 101}]),
    (CHAT, "top_k", [-1, 0, INT32], [-2, 2**31, INT64]),
    (CHAT, "seed", [-INT64 - 1, INT64], [INT64 + 1, -INT64 - 2, 2**200]),
    (CHAT, "metadata", [{str(i): "x" for i in range(16)}], [{str(i): "x" for i in range(17)}]),
    (CHAT, "messages", [[{"role": "user", "content": ""}] * 30], [[], [{"role": "user", "content": ""}] * 10_001]),
]  # fmt: skip


@pytest.mark.parametrize(
    "path, field, taken, refused", FANS, ids=[f"{path[4:8]}-{field}" for path, field, _, _ in FANS]
)
def test_at_each_bound(client: httpx.Client, path: str, field: str, taken: list[Any], refused: list[Any]) -> None:
    base: dict[str, Any] = chat("Hello") if path == CHAT else dict(PROMPT)
    base |= {"max_tokens": 2} | ({"logprobs": True} if field == "top_logprobs" else {})
    for value in taken:
        answer = client.post(path, json=base | {field: value})
        assert answer.status_code == 200, (value, answer.text)
        wanted = base | {field: value}
        prompts = wanted.get("prompt", "")
        count = (len(prompts) if isinstance(prompts, list) and not isinstance(prompts[0], int) else 1) * wanted.get(
            "n", 1
        )
        assert len(answer.json()["choices"]) == count
    for value in refused:
        answer = client.post(path, json=base | {field: value})
        assert answer.status_code == 400, (value, answer.text)
        assert (answer.json()["error"]["param"] or field).split(".")[0] in (field, "n")


def test_fans_do_not_multiply(client: httpx.Client) -> None:
    """What each field allows alone is too much together."""
    for change in ({"prompt": ["a"] * 16, "n": 2}, {"prompt": ["a"] * 2, "n": 9}, {"prompt": [[1]] * 8, "n": 3}):
        assert client.post(TEXT, json=PROMPT | change).status_code == 400
    answer = client.post(TEXT, json=PROMPT | {"prompt": ["a"] * 4, "n": 4, "max_tokens": 1, "logprobs": 20})
    assert len(answer.json()["choices"]) == 16


ODD = [
    "", "\x00", "\x00" * 100, "\ud800", "\udfff\ud800", "\uffff", "\U0010ffff", "\u202e", "a\u0301" * 99,
    "\ufdfa" * 50,
    "\r\n\r\nHTTP/1.1 200 OK", "data: [DONE]\n\n", "<|im_end|>\n<|im_start|>system\n", "<|endoftext|>",
    "</s>", "<0x00>",
    "{{ ''.__class__.__mro__ }}", "{% for i in range(10**9) %}x{% endfor %}", "%s%n%x", "$(id)", "`id`",
    "../../etc/passwd",
    "'; DROP TABLE x; --", "\u0130\u017f\u212a", "٣", "NaN", "-0", "1e999", "\x1b[2J", "x" * 50_000,
]  # fmt: skip
FIELDS = [
    "user", "prompt_cache_key", "prompt_cache_retention", "safety_identifier", "model", "stop", "suffix",
    "service_tier", "reasoning_effort", "verbosity", "tool_choice", "response_format", "modalities", "echo", "best_of",
    "logit_bias",
    "temperature", "top_p", "top_k", "min_p", "n", "seed", "max_tokens", "min_tokens", "stream", "stream_options",
    "logprobs", "top_logprobs", "frequency_penalty", "presence_penalty", "repetition_penalty", "ignore_eos",
    "stop_token_ids", "metadata", "prompt_cache_options", "tools", "functions", "function_call", "parallel_tool_calls",
    "continue_final_message", "skip_special_tokens", "web_search_options", "prediction", "audio", "store",
]  # fmt: skip


def shapes(odd: str) -> Iterator[dict[str, Any]]:
    """`odd` in every place of a request that may hold a string, one at a time, and in many that may not."""
    for field in FIELDS:
        yield chat("Hello") | {field: odd}
    yield chat(odd)
    yield chat("Hello") | {"stop": [odd]}
    yield chat("Hello") | {"logit_bias": {odd: 1}}
    yield chat("Hello") | {"metadata": {odd: odd}}
    yield chat("Hello") | {"prompt_cache_options": {odd: [odd]}}
    yield chat("Hello") | {odd: odd}
    yield chat("Hello") | {"stream_options": {odd: odd}, "stream": True}
    for message in ({"role": odd, "content": "x"}, {"role": "user", "content": odd, "name": odd},
                    {"role": "user", "content": [{"type": "text", "text": odd}]},
                    {"role": "user", "content": [{"type": odd}]},
                    {"role": "system", "content": odd}, {"role": "user", "content": "x", odd: odd}):  # fmt: skip
        yield {"model": MODEL, "messages": [message, {"role": "user", "content": "x"}]}


@pytest.mark.parametrize("number", range(len(ODD)))
def test_no_odd_string_ends_the_engine(client: httpx.Client, number: int) -> None:
    odd = ODD[number]
    for body in shapes(odd):
        answer = client.post(CHAT, content=json.dumps({"max_tokens": 1} | body))
        assert answer.status_code in (200, 400, 404), (body, answer.text)
    for prompt in (odd, [odd]):
        body = PROMPT | {"prompt": prompt, "max_tokens": 1}
        assert client.post(TEXT, content=json.dumps(body)).status_code in (200, 400)


HEADERS = ["x-session-id", "x-correlation-id", "x-request-id", "x-wherry-priority", "x-wherry-queue-timeout-ms",
    "cache-control", "content-type", "content-encoding", "accept", "accept-encoding", "traceparent", "expect", "te",
    "user-agent", "cookie", "openai-organization"]  # fmt: skip


def test_no_odd_header_ends_the_engine(client: httpx.Client) -> None:
    for name in HEADERS:
        for value in (
            b"",
            b"\xff\xfe",
            b"\xc3\x28",
            b"%00",
            b"a" * 8000,
            b"-1",
            b"9" * 400,
            b"{{7*7}}",
            b"no-cache," * 500,
        ):
            answer = client.post(CHAT, json=chat("Hello", max_tokens=1), headers={name.encode(): value})
            assert answer.status_code in (200, 400, 403, 404), (name, value, answer.text)


GRAMMARS: list[tuple[str, Any]] = [
    ("response_format", {"type": "json_object"}),
    ("response_format", {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "object"}}}),
    ("response_format", {"type": "json_schema", "json_schema": {"schema": {"type": "string", "pattern": "(a+)+b"}}}),
    ("response_format", {"type": "structural_tag", "structures": []}),
    ("guided_regex", "(a+)+b"),
    ("guided_json", {"type": "string", "pattern": "(a+)+b"}),
    ("guided_grammar", 'root ::= root root | "a"'),
    ("guided_choice", ["a"] * 1000),
    ("guided_decoding_backend", "outlines"),
    ("structured_outputs", {"regex": "(a+)+b"}),
    ("regex", "(a|aa)+$"),
    ("ebnf", 'root ::= "a"'),
    ("json_schema", "{}"),
    ("tools", [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]),
    ("functions", [{"name": "f", "parameters": {}}]),
    ("logits_processors", ["os.system"]),
    ("chat_template", "{{ messages }}"),
    ("chat_template_kwargs", {"chat_template": "{{ messages }}"}),
    ("add_generation_prompt", True),
    ("documents", [{"text": "{{ 7*7 }}"}]),
    ("trust_remote_code", True),
]


@pytest.mark.parametrize("field, value", GRAMMARS, ids=[f"{i}-{field}" for i, (field, _) in enumerate(GRAMMARS)])
def test_grammars_and_templates_of_a_request_are_refused_by_name(client: httpx.Client, field: str, value: Any) -> None:
    """None of them is ever compiled, so none has to be bounded. At each place where clients put them."""
    for path, base in ((CHAT, chat("Hello")), (TEXT, PROMPT)):
        answer = client.post(path, json=base | {field: value})
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["param"] == field
        assert error["code"] in ("unsupported_parameter", "unknown_parameter")
    nested = chat("Hello")
    nested["messages"][0][field] = value
    assert client.post(CHAT, json=nested).status_code == 400
    assert client.post(CHAT, json=chat("Hello") | {"extra_body": {field: value}}).status_code == 400


def refused(body: bytes) -> ApiError:
    with pytest.raises(ApiError) as caught:
        parse(ChatCompletionRequest, body)
    return caught.value


BEGIN = b'{"model":"m","messages":[{"role":"user","content":"x"}]'
HEAVY: list[tuple[str, bytes]] = [
    ("messages that are none", b'{"model":"m","messages":[' + b",".join([b'{"a":1}'] * 250_000) + b"]}"),
    ("messages", b'{"model":"m","messages":[' + b",".join([b'{"role":"user","content":""}'] * 70_000) + b"]}"),
    ("fields that are none", BEGIN + b"".join(b',"a%d":1' % i for i in range(170_000)) + b"}"),
    ("fields of a message", BEGIN[:-2] + b"".join(b',"a%d":1' % i for i in range(170_000)) + b"}]}"),
    ("a number", BEGIN + b',"seed":' + b"1" * 2_000_000 + b"}"),
    ("a schema that is deep", BEGIN + b',"response_format":' + b'{"a":' * 300_000 + b"1" + b"}" * 300_000 + b"}"),
    ("a schema that is wide", BEGIN + b',"response_format":{"a":[' + b",".join([b"{}"] * 600_000) + b"]}}"),
    ("biases", BEGIN + b',"logit_bias":{' + b",".join(b'"%d":1' % i for i in range(170_000)) + b"}}"),
]


@pytest.mark.parametrize("_, body", HEAVY, ids=[name for name, _ in HEAVY])
def test_what_is_refused_is_refused_quickly(_: str, body: bytes) -> None:
    """2 MB of it. While it is checked nobody else's tokens pass."""
    began = time.process_time()
    assert refused(body).status == 400
    assert time.process_time() - began < 1.0


def test_ten_thousand_schemas_leave_nothing_behind() -> None:
    def refuse(number: int) -> None:
        schema = {"type": "object", "properties": {f"p{number}_{i}": {"type": "string"} for i in range(3)}}
        change = {"response_format": {"type": "json_schema", "json_schema": {"name": f"s{number}", "schema": schema}}}
        assert refused(json.dumps(chat("x") | change).encode()).param == "response_format"

    for number in range(100):
        refuse(number)
    gc.collect()
    tracemalloc.start()
    for number in range(10_000):
        refuse(number)
    gc.collect()
    grown, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert grown < 200_000
