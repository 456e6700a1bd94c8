"""The engine through its front door: events, errors, cancellation, isolation and liveness, on real models."""

import asyncio
import math
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.runtime.engines import TINY, VOCAB_SIZE, Answered, ask, ask_all, engine_config, running, settled
from tests.runtime.random_models import CASES

from wherry_protocol.worker import ChatMessage, End, ExecuteRequest, Metrics, Prompt, SamplingParams, Started, Token
from wherry_runtime.engine.async_engine import AsyncEngine, ModelError, RequestError
from wherry_runtime.engine.resume import digest_of
from wherry_runtime.engine.runner import ModelRunner, Prepared
from wherry_runtime.engine.sampling import BadLogitsError, Sampled
from wherry_runtime.scheduling.scheduler import Scheduler
from wherry_runtime.tokenization.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random, three layers, a token for each byte; its context is 512 tokens."""
    directory = tmp_path_factory.mktemp("model")
    CASES[0].build(directory)
    return directory


@pytest.fixture
async def engine(model: Path) -> AsyncIterator[AsyncEngine]:
    async with running(model) as started:
        yield started


def execute(prompt: Prompt | None = None, **fields: Any) -> ExecuteRequest:
    sampling = fields.pop("sampling", SamplingParams(max_tokens=5))
    prompt = prompt or Prompt(token_ids=[1, 2, 3])
    return ExecuteRequest(**{"id": "r", "model": "m", "prompt": prompt, "sampling": sampling, **fields})


def link_files(model: Path, directory: Path) -> None:
    """The same checkpoint elsewhere, for changing some of its files."""
    for path in model.iterdir():
        (directory / path.name).symlink_to(path)


async def refusal(engine: AsyncEngine, request: ExecuteRequest) -> RequestError:
    with pytest.raises(RequestError) as failure:
        await anext(engine.generate(request))
    return failure.value


class TestAnswers:
    async def test_events_in_order(self, engine: AsyncEngine) -> None:
        answer = await ask(engine, [1, 2, 3], temperature=0, max_tokens=10, seed=5)
        kinds = [type(e) for e in answer.events]
        assert kinds == [Started, *[Token] * (len(kinds) - 3), Metrics, End]
        assert answer.started == Started(
            id="r",
            prompt_tokens=3,
            cached_tokens=0,
            seed=5,
            prompt_digest=digest_of([1, 2, 3]),
            version=answer.started.version,
        )
        assert len(answer.started.version) == 16
        tokens = [e for e in answer.events if isinstance(e, Token)]
        assert [t.index for t in tokens] == [sum(len(p.ids) for p in tokens[:i]) for i in range(len(tokens))]
        assert answer.end == End(finish_reason="length", prompt_tokens=3, completion_tokens=10)
        metrics = answer.events[-2]
        assert isinstance(metrics, Metrics)
        assert min(metrics.queue_s, metrics.prefill_s, metrics.decode_s) >= 0
        assert metrics.prefill_s > 0
        assert metrics.decode_s > 0

    async def test_a_slow_reader_gets_tokens_together(self, engine: AsyncEngine) -> None:
        events = engine.generate(execute(sampling=SamplingParams(max_tokens=50, temperature=0)))
        first = await anext(events)
        await settled(engine)
        rest = [e async for e in events]
        assert isinstance(first, Started)
        assert [type(e) for e in rest] == [Token, Metrics, End]
        assert Answered([first, *rest]).ids == (await ask(engine, [1, 2, 3], temperature=0, max_tokens=50)).ids

    async def test_drawn_seeds_are_told_and_repeat_the_answer(self, engine: AsyncEngine) -> None:
        first = await ask(engine, [1, 2, 3], max_tokens=20)
        again = await ask(engine, [1, 2, 3], max_tokens=20, seed=first.started.seed)
        other = await ask(engine, [1, 2, 3], max_tokens=20)
        assert again.ids == first.ids
        assert other.started.seed != first.started.seed
        assert other.ids != first.ids

    async def test_a_continued_answer_goes_on_the_same(self, engine: AsyncEngine) -> None:
        """What resuming on another replica rests on: noise is keyed by the absolute position."""
        whole = await ask(engine, [1, 2, 3], seed=3, max_tokens=30)
        rest = await ask(engine, [1, 2, 3, *whole.ids[:12]], seed=3, max_tokens=18)
        assert rest.ids == whole.ids[12:]

    async def test_max_tokens_defaults_to_the_context(self, model: Path) -> None:
        async with running(model, max_model_len=40) as engine:
            answer = await ask(engine, [1] * 7, temperature=0)
            assert answer.end.completion_tokens == 33
            assert (await ask(engine, [1] * 39, temperature=0)).end.completion_tokens == 1
            assert (await ask(engine, [1] * 30, max_tokens=500)).end.completion_tokens == 10

    async def test_stop_token_ids(self, engine: AsyncEngine) -> None:
        free = await ask(engine, [1, 2, 3], temperature=0, max_tokens=20)
        stop = free.ids[8]
        first = free.ids.index(stop)
        stopped = await ask(engine, [1, 2, 3], temperature=0, max_tokens=20, stop_token_ids=[stop])
        assert stopped.ids == free.ids[: first + 1]
        assert (stopped.end.finish_reason, stopped.end.stop_reason) == ("stop", stop)
        assert free.text.startswith(stopped.text)
        later = await ask(engine, [1, 2, 3], temperature=0, max_tokens=20, stop_token_ids=[stop], min_tokens=15)
        assert later.end.completion_tokens >= 15

    async def test_stop_strings(self, engine: AsyncEngine) -> None:
        """Every cut of an answer's text as the stop string: the text ends before its first place."""
        tokenizer = Tokenizer(Path(engine._config.model_uri))
        free = await ask(engine, [1, 2, 3], temperature=0, max_tokens=24)
        text = tokenizer.decode(free.ids)
        assert free.text == text
        for start in range(0, len(text) - 3, 3):
            stop = text[start : start + 3]
            answer = await ask(engine, [1, 2, 3], temperature=0, max_tokens=24, stop=["@@never", stop])
            assert answer.text == text[: text.index(stop)]
            assert (answer.end.finish_reason, answer.end.stop_reason) == ("stop", stop)
            assert answer.ids == free.ids[: answer.end.completion_tokens]

    async def test_logprobs(self, engine: AsyncEngine) -> None:
        answer = await ask(engine, [1, 2, 3], temperature=0, max_tokens=6, logprobs=3)
        rows = [row for e in answer.events if isinstance(e, Token) for row in e.logprobs]
        assert [row.sampled.id for row in rows] == answer.ids
        for row in rows:
            assert row.sampled == row.top[0]
            assert row.top == sorted(row.top, key=lambda t: -t.logprob)
            assert len(row.top) == 3
            assert sum(math.exp(t.logprob) for t in row.top) <= 1
            assert bytes(row.sampled.bytes).decode(errors="replace") == row.sampled.text

    async def test_the_sample_model_talks(self) -> None:
        async with running(TINY, dtype="auto", block_size=16) as engine:
            prompt = Prompt(messages=[ChatMessage(role="user", content="What is a ferry?")])
            alone = await ask(engine, prompt, seed=1, max_tokens=48, temperature=0.7)
            assert alone.text.strip()
            assert "<|im_end|>" not in alone.text
            assert alone.ids[-1] in engine.eos_token_ids or alone.end.finish_reason == "length"
            assert (engine.family, engine.num_parameters, engine.max_model_len) == ("llama", 7_999_744, 2048)
            longer = await ask(engine, prompt, seed=1, max_tokens=100, temperature=0.7, ignore_eos=True)
            assert longer.end.completion_tokens == 100


REFUSED: dict[str, tuple[ExecuteRequest, int, str, str | None, str]] = {
    "another model": (execute(model="x"), 404, "model_not_found", "model", "model 'x' is not served here; 'm' is"),
    "no prompt": (execute(Prompt()), 400, "invalid_prompt", "prompt", "not none of them"),
    "two prompts": (execute(Prompt(text="a", token_ids=[1])), 400, "invalid_prompt", "prompt", "text and token_ids"),
    "empty text": (execute(Prompt(text="")), 400, "empty_prompt", "prompt", "the prompt is empty"),
    "empty tokens": (execute(Prompt(token_ids=[])), 400, "empty_prompt", "prompt", "the prompt is empty"),
    "empty chat": (execute(Prompt(messages=[])), 400, "empty_prompt", "messages", "messages is empty"),
    "over the context": (
        execute(Prompt(token_ids=[1] * 512)),
        *(400, "context_length_exceeded", "prompt", "the prompt has 512 tokens and the model's context is 512 tokens"),
    ),
    "unknown token": (execute(Prompt(token_ids=[VOCAB_SIZE])), 400, "invalid_token", "prompt", "0 to 319"),
    "negative token": (execute(Prompt(token_ids=[-1])), 400, "invalid_token", "prompt", "token id -1"),
    "half a character": (execute(Prompt(text="a\ud800")), 400, "invalid_prompt", "prompt", "character 1 of the prompt"),
    "empty id": (execute(id=""), 400, "invalid_value", "id", "1 to 512 characters"),
    "absurd priority": (execute(priority=1 << 70), 400, "invalid_value", "priority", "at most"),
}
BAD_SAMPLING: list[tuple[str, Any]] = [
    ("temperature", -0.1),
    ("temperature", math.nan),
    ("temperature", math.inf),
    ("top_p", 0.0),
    ("top_p", 1.1),
    ("top_k", -1),
    ("min_p", 1.5),
    ("presence_penalty", 2.1),
    ("frequency_penalty", -2.1),
    ("repetition_penalty", 0.0),
    ("max_tokens", 0),
    ("max_tokens", -5),
    ("min_tokens", -1),
    ("min_tokens", 6),  # more than max_tokens
    ("seed", 1 << 64),
    ("logprobs", 21),
    ("logprobs", -1),
    ("stop", [""]),
    ("stop", ["x"] * 17),
    ("stop", ["x" * 1001]),
    ("stop_token_ids", [VOCAB_SIZE]),
    ("stop_token_ids", [0] * 257),
    ("logit_bias", {VOCAB_SIZE: 1.0}),
    ("logit_bias", {-1: 1.0}),
    ("logit_bias", {1: 101.0}),
    ("logit_bias", {1: math.nan}),
    ("logit_bias", dict.fromkeys(range(2000), 1.0)),
]


class TestRefusals:
    @pytest.mark.parametrize("name", REFUSED)
    async def test_requests_that_cannot_start(self, engine: AsyncEngine, name: str) -> None:
        request, status, code, param, message = REFUSED[name]
        error = await refusal(engine, request)
        assert (error.status, error.code, error.param, error.retryable) == (status, code, param, False)
        assert message in error.message
        assert (await ask(engine, [1, 2], max_tokens=3)).end.completion_tokens <= 3

    @pytest.mark.parametrize("param,value", BAD_SAMPLING, ids=str)
    async def test_sampling_out_of_range(self, engine: AsyncEngine, param: str, value: Any) -> None:
        error = await refusal(engine, execute(sampling=SamplingParams(**{"max_tokens": 5, param: value})))
        assert (error.status, error.code, error.param) == (400, "invalid_value", param)
        assert param in error.message

    async def test_before_start_and_after_close(self, model: Path) -> None:
        engine = AsyncEngine(engine_config(model))
        assert (await refusal(engine, execute())).code == "not_ready"
        assert not engine.load().ready
        assert engine.heartbeat_age() == 0
        await engine.start()
        await engine.close()
        await engine.close()
        error = await refusal(engine, execute())
        assert (error.status, error.retryable) == (503, True)

    async def test_a_live_id_is_taken(self, engine: AsyncEngine) -> None:
        first = engine.generate(execute(sampling=SamplingParams(max_tokens=400, ignore_eos=True)))
        await anext(first)
        error = await refusal(engine, execute())
        assert (error.status, error.code) == (400, "duplicate_id")
        await first.aclose()
        assert (await ask(engine, [1, 2], max_tokens=3)).end.prompt_tokens == 2

    async def test_full_queue(self, model: Path) -> None:
        async with running(model, max_running=1, max_queued=1, prefix_cache=False) as engine:
            gate = _hold_steps(engine)
            tasks = [asyncio.create_task(ask(engine, [1, 2], request_id=f"q{i}", max_tokens=3)) for i in range(2)]
            async with asyncio.timeout(10):
                while engine.load().running + engine.load().waiting < 2:  # noqa: ASYNC110 - no event for it
                    await asyncio.sleep(0.002)
            error = await refusal(engine, execute(id="third"))
            assert (error.status, error.code, error.retryable) == (429, "queue_full", True)
            gate.set()
            assert [a.end.completion_tokens for a in await asyncio.gather(*tasks)] == [3, 3]
            assert (await ask(engine, [1, 2], request_id="third", max_tokens=3)).end.completion_tokens == 3

    async def test_more_kv_cache_than_there_is(self, model: Path) -> None:
        async with running(model, kv_blocks=10, max_model_len=100) as engine:
            error = await refusal(engine, execute(sampling=SamplingParams(max_tokens=60)))
            assert (error.code, error.param) == ("kv_cache_too_small", "max_tokens")
            assert "need 63 tokens of KV cache and there are 40" in error.message
            assert (await refusal(engine, execute(Prompt(token_ids=[1] * 50)))).code == "kv_cache_too_small"
            assert (await ask(engine, [1, 2, 3], ignore_eos=True)).end.completion_tokens == 37

    async def test_chat_without_a_template(self, model: Path, tmp_path: Path) -> None:
        link_files(model, tmp_path)
        (tmp_path / "tokenizer_config.json").unlink()
        async with running(tmp_path) as engine:
            request = execute(Prompt(messages=[ChatMessage(role="user", content="hi")]))
            assert (await refusal(engine, request)).code == "chat_template_missing"

    @pytest.mark.parametrize(
        ("source", "status"), [("{{ raise_exception('no system role') }}", 400), ("{{ nothing.x }}", 500)]
    )
    async def test_chat_templates_that_fail(self, model: Path, tmp_path: Path, source: str, status: int) -> None:
        link_files(model, tmp_path)
        (tmp_path / "chat_template.jinja").write_text(source)
        async with running(tmp_path) as engine:
            error = await refusal(engine, execute(Prompt(messages=[ChatMessage(role="user", content="hi")])))
            assert (error.status, error.code) == (status, "chat_template_error")

    async def test_a_model_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(ModelError) as failure:
            await AsyncEngine(engine_config(tmp_path)).start()
        assert failure.value.code == "missing_file"


def _hold_steps(engine: AsyncEngine) -> threading.Event:
    """The step loop waits in its next step until the event is set."""
    gate = threading.Event()
    runner = engine._core.runner
    run = runner.run

    def held(*args: Any) -> Any:
        gate.wait(20)
        return run(*args)

    runner.run = held
    return gate


class TestCancellation:
    async def test_an_id_is_free_again_at_once(self, engine: AsyncEngine) -> None:
        """A late cancellation of a request never meets the next one of the same id."""
        for _ in range(20):
            events = engine.generate(execute(sampling=SamplingParams(max_tokens=400, ignore_eos=True)))
            await anext(events)
            await events.aclose()
            answer = await ask(engine, [1, 2, 3], max_tokens=4, ignore_eos=True)
            assert answer.end.completion_tokens == 4

    async def test_cancel_ends_the_stream_and_frees_the_cache(self, engine: AsyncEngine) -> None:
        events = engine.generate(execute(sampling=SamplingParams(max_tokens=400, ignore_eos=True)))
        got = [await anext(events), await anext(events)]
        assert engine.cancel("r")
        got += [e async for e in events]
        assert Answered(got).end.finish_reason == "cancelled"
        assert not engine.cancel("r")
        assert not engine.cancel("nobody")

    async def test_cancel_before_the_prompt_is_tokenized(self, engine: AsyncEngine) -> None:
        task = asyncio.create_task(ask(engine, Prompt(text="a" * 400), max_tokens=100, ignore_eos=True))
        gate = asyncio.Event()
        encode = type(engine._loaded).encode

        async def held(loaded: Any, text: str, *, special_tokens: bool) -> list[int]:
            await gate.wait()
            return await encode(loaded, text, special_tokens=special_tokens)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(type(engine._loaded), "encode", held)
            await asyncio.sleep(0)
            assert engine.cancel("r")
            gate.set()
            assert (await task).end.finish_reason == "cancelled"

    async def test_closing_the_iterator_cancels(self, engine: AsyncEngine) -> None:
        events = engine.generate(execute(sampling=SamplingParams(max_tokens=500, ignore_eos=True)))
        await anext(events)
        await events.aclose()
        await settled(engine)
        assert engine.load().kv_tokens_used == 0
        assert engine.load().completion_tokens_total < 500

    async def test_cancelling_the_task_cancels_even_in_the_queue(self, model: Path) -> None:
        async with running(model, max_running=1) as engine:
            tasks = [
                asyncio.create_task(ask(engine, [1, i], request_id=f"c{i}", max_tokens=400, ignore_eos=True))
                for i in range(4)
            ]
            async with asyncio.timeout(10):
                while engine.load().running + engine.load().waiting < 4:  # noqa: ASYNC110 - no event for it
                    await asyncio.sleep(0.002)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await settled(engine)
            assert (await ask(engine, [1, 2], max_tokens=3)).end.completion_tokens == 3

    async def test_close_ends_running_requests_with_a_retryable_error(self, model: Path) -> None:
        engine = AsyncEngine(engine_config(model))
        await engine.start()
        events = engine.generate(execute(sampling=SamplingParams(max_tokens=500, ignore_eos=True)))
        got = [await anext(events)]
        await engine.close()
        got += [e async for e in events]
        assert (Answered(got).error.code, Answered(got).error.retryable) == ("shutting_down", True)


class TestIsolation:
    async def test_one_request_that_cannot_be_computed_fails_alone(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A step that raises (here: an embedding looked up out of range, as corrupted state would) is taken apart."""
        real = ModelRunner.run

        def odd(self: ModelRunner, prepared: Prepared, live: Any) -> Any:
            for s in prepared.sequences:
                if s.request_id.startswith("r1#"):
                    torch.nn.functional.embedding(torch.tensor([10**9]), torch.zeros(3, 3))
            return real(self, prepared, live)

        monkeypatch.setattr(ModelRunner, "run", odd)
        async with running(model) as engine:
            answers = await ask_all(engine, [[1, 2], [3, 4], [5, 6]], max_tokens=8, temperature=0, ignore_eos=True)
            assert answers[1].error.code == "engine_error"
            assert [answers[i].end.completion_tokens for i in (0, 2)] == [8, 8]
            monkeypatch.undo()
            assert (await ask(engine, [3, 4], max_tokens=8, temperature=0)).end.completion_tokens == 8

    async def test_out_of_memory_is_told_and_survived(self, model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        real = ModelRunner.run

        def greedy(self: ModelRunner, prepared: Prepared, live: Any) -> Any:
            if any(s.request_id.startswith("r0#") for s in prepared.sequences):
                torch.empty(1 << 55)
            return real(self, prepared, live)

        monkeypatch.setattr(ModelRunner, "run", greedy)
        async with running(model) as engine:
            answers = await ask_all(engine, [[1, 2], [3, 4]], max_tokens=4, ignore_eos=True)
            assert (answers[0].error.code, answers[0].error.retryable) == ("out_of_memory", True)
            assert answers[1].end.completion_tokens == 4

    async def test_output_that_is_not_finite_does_not_spread(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """NaN in one request's keys and values: its own error, and the blocks are clean for the next one."""
        async with running(model, kv_blocks=24, prefix_cache=False, max_model_len=60) as engine:
            clean = await ask(engine, [1, 2, 3], max_tokens=20, temperature=0, ignore_eos=True)
            real = ModelRunner.run

            def poison(self: ModelRunner, prepared: Prepared, live: Any) -> dict[str, Sampled | BadLogitsError]:
                for s in prepared.sequences:
                    if s.request_id.startswith("bad#") and s.start:
                        for layer in self.cache.layers:
                            layer[s.blocks] = math.nan
                return real(self, prepared, live)

            monkeypatch.setattr(ModelRunner, "run", poison)
            bad = await ask(engine, [1, 2, 3], request_id="bad", max_tokens=20, ignore_eos=True)
            assert bad.error.code == "bad_logits"
            for _ in range(3):
                again = await ask_all(engine, [[1, 2, 3]] * 4, max_tokens=20, temperature=0, ignore_eos=True)
                assert all(a.ids == clean.ids for a in again)

    async def test_a_bug_in_scheduling_ends_requests_but_not_the_engine(
        self, model: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def broken(self: Scheduler) -> Any:
            raise KeyError("bug")

        async with running(model) as engine:
            before = (await ask(engine, [1, 2], max_tokens=3)).end.completion_tokens
            monkeypatch.setattr(Scheduler, "schedule", broken)
            answer = await ask(engine, [1, 2], max_tokens=3)
            assert (answer.error.code, answer.error.retryable) == ("engine_error", True)
            monkeypatch.undo()
            assert (await ask(engine, [1, 2], max_tokens=3)).end.completion_tokens == before


class TestLiveness:
    async def test_the_heartbeat_is_the_step_loops(self, engine: AsyncEngine) -> None:
        """Fresh while idle; stale while a step hangs, though the event loop is fine."""
        async with asyncio.timeout(10):
            for _ in range(3):
                beat = engine._core.heartbeat
                while engine._core.heartbeat == beat:  # noqa: ASYNC110 - no event for it
                    await asyncio.sleep(0.01)
        gate = _hold_steps(engine)
        task = asyncio.create_task(ask(engine, [1, 2], max_tokens=2))
        async with asyncio.timeout(10):
            while engine.heartbeat_age() < 0.5:  # noqa: ASYNC110 - no event for it
                await asyncio.sleep(0.01)
        gate.set()
        await task
        assert engine.heartbeat_age() < 0.5

    async def test_the_event_loop_is_never_blocked_by_a_step(self, engine: AsyncEngine) -> None:
        gate = _hold_steps(engine)
        task = asyncio.create_task(ask(engine, [1, 2], max_tokens=2))
        began = time.monotonic()
        for _ in range(50):
            await asyncio.sleep(0.001)
            assert engine.load().ready
        assert time.monotonic() - began < 10
        gate.set()
        await task

    async def test_the_load_report_counts(self, model: Path) -> None:
        async with running(model) as engine:
            await ask_all(engine, [[1] * 9, [2] * 9], max_tokens=4, ignore_eos=True)
            await ask(engine, [1] * 9, max_tokens=4, ignore_eos=True)
            report = engine.load()
            assert report.ready
            assert report.prompt_tokens_total == 27
            assert report.completion_tokens_total == 12
            assert report.prefix_hit_tokens_total == 8
            assert report.kv_tokens_total == 8 * 512
            assert report.steps_total >= 8


finite = st.floats(allow_nan=True, allow_infinity=True)
FIELDS: dict[str, st.SearchStrategy[Any]] = {
    "max_tokens": st.none() | st.integers(-1, 12),
    "min_tokens": st.integers(-1, 8),
    "temperature": st.sampled_from([0, 0.0, 1e-38, 1e-9, 0.7, 1, 2.0, 100.0]) | finite,
    "top_k": st.sampled_from([-1, 0, 1, 5, 319, 320, 321, 1 << 31, 1 << 40]),
    "top_p": st.sampled_from([1e-38, 1e-9, 0.5, 0.999999, 1.0]) | finite,
    "min_p": st.sampled_from([0.0, 1e-38, 0.5, 1.0]) | finite,
    "presence_penalty": st.floats(-2, 2) | finite,
    "frequency_penalty": st.floats(-2, 2) | finite,
    "repetition_penalty": st.sampled_from([1e-38, 1e-9, 0.5, 1.0, 1.5, 100.0]) | finite,
    "seed": st.none() | st.sampled_from([0, -1, 1 << 63, (1 << 64) - 1, -(1 << 63)]) | st.integers(),
    "stop": st.lists(st.text(max_size=5), max_size=3) | st.sampled_from([["\ud800"], ["\x00"], ["a" * 1000]]),
    "stop_token_ids": st.lists(st.integers(-1, 330), max_size=5),
    "ignore_eos": st.booleans(),
    "logit_bias": st.dictionaries(st.integers(-1, 330), st.floats(-100, 100) | finite, max_size=4),
    "logprobs": st.none() | st.integers(-1, 25),
}
PROMPTS = st.one_of(
    st.builds(Prompt, token_ids=st.lists(st.integers(-1, 325), max_size=40)),
    st.builds(Prompt, text=st.text(max_size=30) | st.sampled_from(["\ud800", "\x00", "<|end|>" * 5])),
    st.builds(
        Prompt,
        messages=st.lists(
            st.builds(ChatMessage, role=st.sampled_from(["user", "system"]), content=st.text(max_size=10)), max_size=3
        ),
    ),
)


def test_no_request_ends_the_engine(model: Path) -> None:
    """Odd values in every field: a clear refusal or a whole answer, and the next request is answered as ever."""
    with asyncio.Runner() as runner:
        engine = AsyncEngine(engine_config(model, max_model_len=64))
        runner.run(engine.start())
        expected = runner.run(ask(engine, [1, 2, 3], temperature=0, max_tokens=3)).ids

        async def attempt(params: dict[str, Any], prompt: Prompt) -> None:
            try:
                request = execute(prompt, id="odd", sampling=SamplingParams(**params))
                events = [e async for e in engine.generate(request)]
            except RequestError as e:
                if e.status != 400:
                    raise
            else:
                assert isinstance(events[-1], End), events[-1]
            probe = await ask(engine, [1, 2, 3], temperature=0, max_tokens=3)
            assert probe.ids == expected

        @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.too_slow])
        @given(st.fixed_dictionaries({}, optional=FIELDS), PROMPTS)
        def fuzz(params: dict[str, Any], prompt: Prompt) -> None:
            runner.run(attempt(params, prompt))

        fuzz()
        engine._core.scheduler.check_integrity()
        assert engine.load().kv_tokens_used == 0
        runner.run(engine.close())
