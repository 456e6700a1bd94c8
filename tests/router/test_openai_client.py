"""The unmodified `openai` client against router → worker, and against `wherry serve`, with the sample model."""

from collections.abc import Iterator

import openai
import pytest
from tests.router.harness import MODEL, Process, eventually, router, serve

HELLO = [{"role": "user", "content": "Tell me about boats."}]


@pytest.fixture(scope="module", params=["tiny_router", "tiny_serve"])
def client(request: pytest.FixtureRequest) -> Iterator[openai.OpenAI]:
    process: Process = request.getfixturevalue(request.param)
    with openai.OpenAI(base_url=process.url + "/v1", api_key="unused", max_retries=0, timeout=60) as client:
        yield client


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "wherry"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("other")


def test_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=12, temperature=0)
    assert answer.object == "chat.completion"
    assert answer.id.startswith("chatcmpl-")
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].message.content
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer._request_id


def test_chat_stream_equals_the_whole_answer(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": HELLO, "max_completion_tokens": 16, "temperature": 0}
    whole = client.chat.completions.create(**options)
    chunks = list(client.chat.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    assert text == whole.choices[0].message.content
    assert [c.finish_reason for chunk in chunks for c in chunk.choices if c.finish_reason] == [
        whole.choices[0].finish_reason
    ]
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_completion(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "prompt": "The wherry is", "temperature": 0}
    whole = client.completions.create(**options)
    assert whole.object == "text_completion"
    assert whole.usage.completion_tokens <= 16, "OpenAI's default"
    chunks = list(client.completions.create(**options, stream=True))
    assert "".join(c.text for chunk in chunks for c in chunk.choices) == whole.choices[0].text
    assert all(chunk.usage is None for chunk in chunks)


def test_prompts_of_every_shape(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "max_tokens": 4, "temperature": 0}
    one = client.completions.create(prompt="A boat", **options).choices[0].text
    many = client.completions.create(prompt=["A boat", "A river"], n=2, **options)
    assert [choice.index for choice in many.choices] == [0, 1, 2, 3]
    assert many.choices[0].text == many.choices[1].text == one
    assert many.usage.completion_tokens <= 16
    ids = client.completions.create(prompt=[[10, 11, 12], [13, 14]], **options)
    assert len(ids.choices) == 2
    assert ids.usage.prompt_tokens == 5


def test_stop(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": HELLO, "temperature": 0, "max_tokens": 24}
    whole = client.chat.completions.create(**options).choices[0].message.content
    stop = whole[len(whole) // 2 :][:3]
    stopped = client.chat.completions.create(**options, stop=[stop, "never-there"])
    assert stopped.choices[0].message.content == whole[: whole.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    chunks = client.chat.completions.create(**options, stop=stop, stream=True)
    assert "".join(c.delta.content or "" for x in chunks for c in x.choices) == whole[: whole.index(stop)]


def test_logprobs(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "temperature": 0, "max_tokens": 5}
    content = (
        client.chat.completions.create(messages=HELLO, logprobs=True, top_logprobs=3, **options)
        .choices[0]
        .logprobs.content
    )
    assert 1 <= len(content) <= 5
    for position in content:
        assert position.logprob <= 0
        assert len(position.top_logprobs) == 3
        assert position.top_logprobs[0].token == position.token, "greedy takes the most likely"
        assert bytes(position.bytes).decode(errors="replace")
    chunks = list(client.chat.completions.create(messages=HELLO, logprobs=True, stream=True, **options))
    streamed = [p for chunk in chunks for c in chunk.choices if c.logprobs for p in c.logprobs.content]
    assert [p.token for p in streamed] == [p.token for p in content]
    assert streamed[0].top_logprobs == []
    told = client.completions.create(prompt="A boat", logprobs=2, **options).choices[0]
    assert len(told.logprobs.tokens) == len(told.logprobs.token_logprobs) == len(told.logprobs.text_offset)
    assert told.logprobs.text_offset[0] == 0
    assert all(len(top) <= 2 for top in told.logprobs.top_logprobs)


def test_seed_and_n(client: openai.OpenAI) -> None:
    options = {"model": MODEL, "messages": HELLO, "max_tokens": 8, "seed": 7}
    first = client.chat.completions.create(n=3, **options)
    again = client.chat.completions.create(n=3, **options)
    texts = [choice.message.content for choice in first.choices]
    assert [choice.message.content for choice in again.choices] == texts
    assert len(set(texts)) > 1, "each choice has its own seed"
    alone = client.chat.completions.create(**options)
    assert alone.choices[0].message.content == texts[0]
    assert first.usage.prompt_tokens == alone.usage.prompt_tokens, "the prompt counts once"


def test_content_parts_and_a_returned_answer(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "about boats."}]
    options = {"model": MODEL, "max_tokens": 6, "temperature": 0}
    joined = client.chat.completions.create(messages=[{"role": "user", "content": parts}], **options)
    plain = client.chat.completions.create(messages=HELLO, **options)
    assert joined.choices[0].message.content == plain.choices[0].message.content
    turns = [*HELLO, plain.choices[0].message, {"role": "user", "content": "More."}]
    assert client.chat.completions.create(messages=turns, **options).usage.prompt_tokens > plain.usage.prompt_tokens


REFUSED = [
    ({"messages": []}, "messages"),
    ({"temperature": 3}, "temperature"),
    ({"top_p": 0}, "top_p"),
    ({"n": 1000}, "n"),
    ({"max_tokens": 0}, "max_tokens"),
    ({"stop": ["a", "b", "c", "d", "e"]}, "stop"),
    ({"top_logprobs": 2}, "top_logprobs"),
    ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
    ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ({"response_format": {"type": "json_object"}}, "response_format"),
    (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]},
        "messages.0.content",
    ),
    ({"messages": [{"role": "tool", "content": "x", "tool_call_id": "1"}]}, "messages.0.role"),
    ({"logit_bias": {"x": 1}}, "logit_bias"),
    ({"stream_options": {"include_usage": True}}, "stream_options"),
    ({"extra_body": {"no_such": 1}}, "no_such"),
    ({"messages": [{"role": "user", "content": "boat " * 5000}]}, None),
]


@pytest.mark.parametrize(
    "change, param", REFUSED, ids=[str(next(iter(c))) + f"-{i}" for i, (c, _) in enumerate(REFUSED)]
)
def test_bad_requests(client: openai.OpenAI, change: dict[str, object], param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": MODEL, "messages": HELLO} | change)
    assert caught.value.body["message"]
    if param is not None:
        assert caught.value.param == param


@pytest.mark.parametrize(
    "change", [{"prompt": ""}, {"prompt": []}, {"echo": True}, {"suffix": "x"}, {"best_of": 3}, {"prompt": [999999]}]
)
def test_bad_completions(client: openai.OpenAI, change: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{"model": MODEL, "prompt": "A boat"} | change)
    assert caught.value.body["message"]


def test_harmless_fields_are_taken(client: openai.OpenAI) -> None:
    client.chat.completions.create(
        model=MODEL,
        messages=HELLO,
        max_tokens=2,
        tools=[],
        tool_choice="auto",
        response_format={"type": "text"},
        modalities=["text"],
        metadata={"a": "b"},
        user="me",
        service_tier="auto",
        store=False,
        parallel_tool_calls=True,
        extra_body={"top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 1, "ignore_eos": True},
    )


def test_other_models_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    assert caught.value.code == "model_not_found"


def test_unknown_paths_are_not_found(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.moderations.create(input="x")
    assert caught.value.code == "unknown_url"


def test_too_large(tiny_router: Process) -> None:
    with (
        openai.OpenAI(base_url=tiny_router.url + "/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.APIStatusError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=[{"role": "user", "content": "x" * 1_100_000}])
    assert caught.value.status_code == 413


def test_no_replica_is_a_server_error_with_retry_after() -> None:
    with (
        router("http://127.0.0.1:9", args=("--no-replica-wait-s", "0.1"), wait=0) as front,
        openai.OpenAI(base_url=front.url + "/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.InternalServerError) as caught,
    ):
        client.chat.completions.create(model=MODEL, messages=HELLO)
    assert caught.value.status_code == 503
    assert caught.value.response.headers["retry-after"]


def test_api_key_and_full_queue() -> None:
    """Where a key is set the client needs it; where the queue is full it is a rate limit."""
    with serve("--max-running", "1", "--max-queued", "1", env={"WHERRY_API_KEY": "secret-key"}) as process:
        url = process.url + "/v1"
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as wrong:
            with pytest.raises(openai.AuthenticationError):
                wrong.models.list()
            with pytest.raises(openai.AuthenticationError):
                wrong.chat.completions.create(model=MODEL, messages=HELLO)
        with openai.OpenAI(base_url=url, api_key="secret-key", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as caught:
                client.chat.completions.create(
                    model=MODEL, messages=HELLO, n=8, max_tokens=64, extra_body={"ignore_eos": True}
                )
            assert caught.value.response.headers["retry-after"]

            def answered() -> bool:
                try:
                    return bool(client.chat.completions.create(model=MODEL, messages=HELLO, max_tokens=2).choices)
                except openai.RateLimitError:
                    return False  # the cancelled choices leave with the next step

            eventually(answered)
        assert "secret-key" not in process.log()
