"""Answers that go on where another worker left off equal the undisturbed ones, whatever was asked and wherever cut."""

import asyncio
import math
import random
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.runtime.engines import BACKENDS, TINY, VOCAB_SIZE, Answered, ask, running, save_byte_tokenizer
from tests.runtime.random_models import CASES
from tests.runtime.test_speculative_engine import DRAFT, always, counts

from wherry_cli.engine_backend import EngineBackend
from wherry_protocol.worker import (
    ChatMessage,
    End,
    ExecuteRequest,
    Metrics,
    Prompt,
    Resume,
    SamplingParams,
    Started,
    Token,
)
from wherry_router.backend import Delivery
from wherry_runtime.engine.async_engine import AsyncEngine, RequestError
from wherry_runtime.engine.core import EngineCore
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.resume import recall
from wherry_runtime.scheduling.request import Request
from wherry_runtime.tokenization.detokenizer import Detokenizer
from wherry_runtime.tokenization.tokenizer import Tokenizer

__all__ = ["always"]  # a fixture

LENGTH = 24
PROMPT = [1, 2, 3, 4, 5, 6, 7]
# The byte tokenizer's ids of the bytes of an emoji: the model's answers are made of them, whole and torn.
TORN = "é😀"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, a token for each byte; its context is 512 tokens."""
    directory = tmp_path_factory.mktemp("model")
    CASES[0].build(directory)
    return directory


@pytest.fixture(params=sorted(BACKENDS))
async def engine(model: Path, request: pytest.FixtureRequest) -> AsyncIterator[AsyncEngine]:
    async with running(model, max_running=32, **BACKENDS[request.param]) as started:
        yield started


def byte_ids(directory: Path, text: str) -> list[int]:
    return Tokenizer(directory).encode(text, special_tokens=False)


def request_of(
    whole: Answered, prompt: Prompt, params: SamplingParams, ids: Sequence[int], name: str
) -> ExecuteRequest:
    started = whole.started
    resume = Resume(token_ids=list(ids), seed=started.seed, prompt_digest=started.prompt_digest)
    return ExecuteRequest(id=name, model="m", prompt=prompt, sampling=params, resume=resume)


async def resumed(engine: AsyncEngine, request: ExecuteRequest) -> Answered:
    return Answered([event async for event in engine.generate(request)])


def boundaries(whole: Answered) -> dict[int, str]:
    """After so many tokens, the text that had been told."""
    told, count, text = {0: ""}, 0, ""
    for event in whole.events:
        if isinstance(event, Token):
            count += len(event.ids)
            text += event.text
            told[count] = text
    return told


def check_same(whole: Answered, rest: Answered, cut: int, told: dict[int, str]) -> None:
    tokens = [e for e in rest.events if isinstance(e, Token)]
    assert rest.ids == whole.ids[cut:], cut
    assert [t.index for t in tokens] == [cut + sum(len(p.ids) for p in tokens[:i]) for i in range(len(tokens))]
    assert whole.text.endswith(rest.text)
    if cut in told:
        assert told[cut] + rest.text == whole.text, cut
    assert rest.started.seed == whole.started.seed
    assert rest.started.prompt_tokens == whole.started.prompt_tokens
    assert rest.started.prompt_digest == whole.started.prompt_digest
    assert rest.end.finish_reason == whole.end.finish_reason
    assert rest.end.stop_reason == whole.end.stop_reason
    assert rest.end.completion_tokens == whole.end.completion_tokens
    assert rest.end.prompt_tokens == whole.end.prompt_tokens
    assert rest.end.cached_tokens <= rest.end.prompt_tokens
    of_whole = [p for e in whole.events if isinstance(e, Token) for p in e.logprobs][cut:]
    of_rest = [p for t in tokens for p in t.logprobs]
    assert len(of_whole) == len(of_rest)
    for one, other in zip(of_whole, of_rest, strict=True):
        assert one.sampled.id == other.sampled.id
        assert one.sampled.text == other.sampled.text
        assert math.isclose(one.sampled.logprob, other.sampled.logprob, abs_tol=1e-3)
        assert all(math.isclose(a.logprob, b.logprob, abs_tol=1e-3) for a, b in zip(one.top, other.top, strict=True))


async def check_every_cut(engine: AsyncEngine, prompt: Prompt, **params: Any) -> Answered:
    """Asks once, then resumes at every token, all at the same time."""
    sampling = SamplingParams(**{"max_tokens": LENGTH, **params})
    first = ExecuteRequest(id="whole", model="m", prompt=prompt, sampling=sampling)
    whole = await resumed(engine, first)
    told = boundaries(whole)
    cuts = range(len(whole.ids) + 1)
    requests = [request_of(whole, prompt, sampling, whole.ids[:cut], f"cut-{cut}") for cut in cuts]
    answers = await asyncio.gather(*(resumed(engine, request) for request in requests))
    for cut, rest in zip(cuts, answers, strict=True):
        check_same(whole, rest, cut, told)
    return whole


PARAMETERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "seeded": {"seed": 5},
    "unseeded": {},
    "filtered": {"seed": 1, "top_k": 20, "top_p": 0.8, "min_p": 0.01, "temperature": 1.4},
    "presence": {"seed": 2, "presence_penalty": 1.5},
    "frequency": {"temperature": 0, "frequency_penalty": 2.0},
    "repetition": {"temperature": 0, "repetition_penalty": 1.7},
    "all penalties": {"seed": 3, "presence_penalty": -1, "frequency_penalty": 1, "repetition_penalty": 1.2},
    "log-probabilities": {"seed": 4, "logprobs": 3},
    "biased": {"seed": 4, "logit_bias": {9: 5.0, 10: -100.0}},
}


@pytest.mark.parametrize("params", PARAMETERS.values(), ids=PARAMETERS)
async def test_every_cut_gives_the_same_answer(engine: AsyncEngine, params: dict[str, Any]) -> None:
    whole = await check_every_cut(engine, Prompt(token_ids=PROMPT), **params)
    assert len(whole.ids) == LENGTH


async def test_characters_torn_by_the_cut_stay_whole(engine: AsyncEngine, model: Path) -> None:
    bias = dict.fromkeys(byte_ids(model, TORN), 30.0)
    for seed in range(6):
        whole = await check_every_cut(engine, Prompt(token_ids=PROMPT), seed=seed, logit_bias=bias)
        assert "\ufffd" in whole.text or "é" in whole.text or "😀" in whole.text


async def test_stop_strings_across_the_cut(engine: AsyncEngine, model: Path) -> None:
    """Every three characters of an answer as the stop string, which starts before a cut and ends behind it."""
    bias = dict.fromkeys(byte_ids(model, "abc"), 30.0)
    free = await ask(engine, PROMPT, seed=7, max_tokens=LENGTH, logit_bias=bias)
    assert set(free.text) <= set("abc")
    for start in range(0, LENGTH - 3, 4):
        stop = [free.text[start : start + 3], "ac" * 9]
        whole = await check_every_cut(engine, Prompt(token_ids=PROMPT), seed=7, logit_bias=bias, stop=stop)
        assert whole.end.stop_reason in stop
        # Not looked for in the first tokens, not even by whoever goes on after them.
        await check_every_cut(
            engine, Prompt(token_ids=PROMPT), seed=7, logit_bias=bias, stop=stop, min_tokens=LENGTH // 2
        )


async def test_stop_tokens_and_the_least_length(engine: AsyncEngine) -> None:
    free = await ask(engine, PROMPT, seed=8, max_tokens=LENGTH)
    stops = [free.ids[10], free.ids[15]]
    whole = await check_every_cut(engine, Prompt(token_ids=PROMPT), seed=8, stop_token_ids=stops)
    assert whole.end.stop_reason in stops
    later = await check_every_cut(engine, Prompt(token_ids=PROMPT), seed=8, stop_token_ids=stops, min_tokens=18)
    assert later.end.completion_tokens >= 18


async def test_parameters_at_random(engine: AsyncEngine) -> None:
    for number in range(12):
        draw = random.Random(number)
        params: dict[str, Any] = {"seed": draw.getrandbits(63), "max_tokens": draw.randint(1, LENGTH)}
        for name, value in {
            "temperature": draw.choice([0, 0.3, 1, 2]),
            "top_k": draw.randint(1, 300),
            "top_p": draw.uniform(0.1, 1),
            "min_p": draw.uniform(0, 0.2),
            "presence_penalty": draw.uniform(-2, 2),
            "frequency_penalty": draw.uniform(-2, 2),
            "repetition_penalty": draw.uniform(0.5, 2),
            "min_tokens": draw.randint(0, params["max_tokens"]),
            "stop_token_ids": draw.sample(range(VOCAB_SIZE), 40),
            "stop": [chr(draw.randint(32, 126)) for _ in range(3)],
            "logprobs": draw.randint(0, 5),
        }.items():
            if draw.random() < 0.5:
                params[name] = value
        await check_every_cut(engine, Prompt(token_ids=PROMPT), **params)


async def test_without_a_prefix_cache(model: Path) -> None:
    async with running(model, max_running=32, prefix_cache=False) as engine:
        await check_every_cut(engine, Prompt(token_ids=PROMPT), seed=5, presence_penalty=1)


async def test_on_a_worker_that_has_never_seen_it(model: Path) -> None:
    async with running(model) as first:
        whole = await ask(first, PROMPT, max_tokens=LENGTH)
    async with running(model) as second:
        params = SamplingParams(max_tokens=LENGTH)
        prompt = Prompt(token_ids=PROMPT)
        rest = await resumed(second, request_of(whole, prompt, params, whole.ids[:10], "r"))
        check_same(whole, rest, 10, boundaries(whole))


async def test_while_the_cache_is_too_small_for_all(model: Path) -> None:
    """Resumed answers are preempted and recomputed like others."""
    async with running(model, kv_blocks=24) as engine:
        await check_every_cut(engine, Prompt(token_ids=PROMPT), seed=9, frequency_penalty=1)
        assert engine.load().preemptions_total > 0


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize("mode", ["ngram", "draft"])
async def test_with_guesses(mode: str) -> None:
    more = {"draft_model_uri": str(DRAFT)} if mode == "draft" else {}
    async with running(TINY, speculative=mode, max_running=32, **more) as engine:
        for params in ({"temperature": 0}, {"seed": 3, "presence_penalty": 0.5}):
            await check_every_cut(engine, Prompt(text="1 2 3 4 1 2 3 4 1 2 3"), **params)
        drafted, accepted = counts(engine)
        assert drafted > accepted > 0


async def test_a_chat_of_the_sample_model() -> None:
    async with running(TINY, max_running=32) as engine:
        chat = Prompt(messages=[ChatMessage(role="user", content="Explain boats to me.")])
        await check_every_cut(engine, chat, temperature=0.8, logprobs=2)


def test_text_is_a_function_of_the_tokens(model: Path) -> None:
    """What a worker that resumes has told and holds back is what the first one had, for text with long characters."""
    tokenizer = Tokenizer(model)
    text = "Grüße 👩‍👩‍👧 日本語 🇩🇪 STOPP St"
    tokens = byte_ids(model, text)
    for stops in ([], ["ST", "👩‍👩"], ["P St!"], ["語 🇩🇪 S"]):
        params = SamplingParams(stop=stops, max_tokens=500)
        parts = []
        detokenizer = Detokenizer(tokenizer, stops)
        for token in tokens:
            if detokenizer.matched is None:
                parts.append(detokenizer.push(token))
        whole = "".join(parts) + detokenizer.finish()
        for cut in range(len(parts)):
            live = Live(
                request=Request(id="r", tokens=[1, *tokens[:cut]], max_new_tokens=500, num_resumed=cut),
                params=params,
                seed=0,
                stop_ids=frozenset(),
            )
            again = Detokenizer(tokenizer, stops)
            assert recall(live, again) is None
            rest = [again.push(token) for token in tokens[cut : len(parts)]]
            assert rest == parts[cut:]
            assert "".join(parts[:cut]) + "".join(rest) + again.finish() == whole
            assert again.matched == detokenizer.matched


class TestRefusals:
    @pytest.mark.parametrize(
        "resume, sampling, says",
        [
            (Resume(token_ids=[VOCAB_SIZE], seed=1), {}, "not in the vocabulary"),
            (Resume(token_ids=[-1], seed=1), {}, "not in the vocabulary"),
            (Resume(token_ids=[1] * 6, seed=1), {"max_tokens": 5}, "max_tokens is 5"),
            (Resume(token_ids=[1] * 600, seed=1), {}, "room for"),
            (Resume(token_ids=[1], seed=1), {"seed": 2}, "own seed is 2"),
            (Resume(token_ids=[1], seed=1 << 64), {}, "64 bits"),
            (Resume(token_ids=[1], seed=1, prompt_digest="00"), {}, "other tokens of the prompt"),
            (Resume(token_ids=[7, 8], seed=1), {"stop_token_ids": [7]}, "ended with token 1 of the 2"),
        ],
    )
    async def test_a_resume_that_cannot_be(
        self, engine: AsyncEngine, resume: Resume, sampling: dict[str, Any], says: str
    ) -> None:
        request = ExecuteRequest(
            id="r",
            model="m",
            prompt=Prompt(token_ids=PROMPT),
            sampling=SamplingParams(**{"max_tokens": None, **sampling}),
            resume=resume,
        )
        with pytest.raises(RequestError, match=says) as failure:
            await anext(engine.generate(request))
        assert (failure.value.code, failure.value.status, failure.value.param) == ("invalid_resume", 400, "resume")
        assert (await ask(engine, PROMPT, request_id="r", max_tokens=1)).end.completion_tokens == 1, "the id is free"

    async def test_an_answer_that_a_stop_string_ended(self, engine: AsyncEngine, model: Path) -> None:
        ids = byte_ids(model, "abcd")
        params = SamplingParams(max_tokens=9, stop=["bc"])
        request = ExecuteRequest(
            id="r",
            model="m",
            prompt=Prompt(token_ids=PROMPT),
            sampling=params,
            resume=Resume(token_ids=ids, seed=1),
        )
        with pytest.raises(RequestError, match="ended with token 3 of the 4"):
            await anext(engine.generate(request))


@pytest.mark.parametrize(
    "params, ids, finish, reason",
    [
        ({"max_tokens": 3}, [20, 21, 22], "length", None),
        ({"max_tokens": 9, "stop_token_ids": [22]}, [20, 21, 22], "stop", 22),
        ({"max_tokens": 3, "stop_token_ids": [22]}, [20, 21, 22], "stop", 22),
    ],
)
async def test_an_answer_that_was_whole_only_ends(
    engine: AsyncEngine, params: dict[str, Any], ids: list[int], finish: str, reason: int | None
) -> None:
    """The worker died between its last token and `end`."""
    request = ExecuteRequest(
        id="r",
        model="m",
        prompt=Prompt(token_ids=PROMPT),
        sampling=SamplingParams(**params),
        resume=Resume(token_ids=ids, seed=77),
    )
    steps = engine.load().steps_total
    answer = await resumed(engine, request)
    assert [type(e) for e in answer.events[1:]] == [Metrics, End]
    assert answer.started.seed == 77
    assert answer.end == End(
        finish_reason=finish,  # type: ignore[arg-type]
        prompt_tokens=len(PROMPT),
        completion_tokens=3,
        stop_reason=reason,
    )
    assert engine.load().steps_total == steps, "nothing was computed"


async def queued(engine: AsyncEngine, count: int) -> None:
    while engine.load().waiting < count:  # noqa: ASYNC110 - the engine offers no event for it
        await asyncio.sleep(0.001)


async def test_a_resumed_answer_goes_before_those_that_wait(model: Path) -> None:
    async with running(model, max_running=1) as engine:
        first = engine.generate(
            ExecuteRequest(id="a", model="m", prompt=Prompt(token_ids=[1]), sampling=SamplingParams(max_tokens=400))
        )
        await anext(first)
        order: list[str] = []

        async def one(name: str, resume: Resume | None) -> None:
            request = ExecuteRequest(
                id=name,
                model="m",
                prompt=Prompt(token_ids=PROMPT),
                sampling=SamplingParams(max_tokens=4),
                resume=resume,
            )
            async for event in engine.generate(request):
                if isinstance(event, End):
                    order.append(name)

        waiting = [asyncio.create_task(one(f"new-{number}", None)) for number in range(3)]
        await queued(engine, 3)
        waiting.append(asyncio.create_task(one("begun", Resume(token_ids=[5, 6], seed=1))))
        await queued(engine, 4)
        await first.aclose()  # type: ignore[attr-defined]
        await asyncio.gather(*waiting)
        assert order == ["begun", "new-0", "new-1", "new-2"]


@pytest.fixture
def dated(model: Path, tmp_path: Path) -> Path:
    """The same model with a chat template that writes the time."""
    for path in model.iterdir():
        if not path.name.startswith("tokenizer"):
            (tmp_path / path.name).symlink_to(path)
    save_byte_tokenizer(tmp_path, "{{ strftime_now('%Y-%m-%d %H:%M:%S') }}{{ messages[0].content }}")
    return tmp_path


async def test_a_template_that_writes_the_time_writes_that_of_the_request(dated: Path) -> None:
    prompt = Prompt(messages=[ChatMessage(role="user", content="Hi")])

    async def digest(engine: AsyncEngine, created: int) -> str:
        request = ExecuteRequest(
            id="r", model="m", prompt=prompt, sampling=SamplingParams(max_tokens=1), created=created
        )
        return (await resumed(engine, request)).started.prompt_digest

    async with running(dated) as engine:
        assert await digest(engine, 1_700_000_000) == await digest(engine, 1_700_000_000)
        assert await digest(engine, 1_700_000_000) != await digest(engine, 1_700_000_001)
        with pytest.raises(RequestError, match="created"):
            await digest(engine, 1 << 60)


@pytest.mark.parametrize("failures, code", [(1, ""), (3, ""), (99, "engine_error")])
async def test_serve_goes_on_after_its_step_loop_failed(
    model: Path, monkeypatch: pytest.MonkeyPatch, failures: int, code: str
) -> None:
    """`wherry serve` has one engine, which starts anew; one that fails again and again without a token ends it."""
    request = ExecuteRequest(
        id="r", model="m", prompt=Prompt(token_ids=PROMPT), sampling=SamplingParams(max_tokens=LENGTH, logprobs=1)
    )
    async with running(model) as engine:
        expected: Answered | None = None
        left = 0
        settle = EngineCore._settle

        def failing(core: EngineCore, *args: Any) -> None:
            nonlocal left
            if left and expected is not None and core.completion_tokens >= before + 5:
                left -= 1
                raise RuntimeError("a bug")
            settle(core, *args)

        monkeypatch.setattr(EngineCore, "_settle", failing)
        started = await resumed(engine, request)
        seeded = msgspec.structs.replace(
            request, sampling=msgspec.structs.replace(request.sampling, seed=started.started.seed)
        )
        expected, before, left = started, engine.load().completion_tokens_total, failures
        backend = EngineBackend(engine)
        answer = Answered([event async for event in backend.generate(seeded, "c", Delivery(whole=False))])
        if code:
            assert answer.error.code == code
            assert 0 < len(answer.ids) < LENGTH
            left = 0
        else:
            assert left == 0
            assert answer.end.completion_tokens == LENGTH
            assert sum(isinstance(event, Started) for event in answer.events) == 1
        assert answer.ids == expected.ids[: len(answer.ids)]
        assert expected.text.startswith(answer.text)
