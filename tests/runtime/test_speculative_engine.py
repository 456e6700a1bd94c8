"""Speculation in the whole engine: the same answers, whatever guesses, and nothing lost when guessing goes wrong."""

import asyncio
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tests.runtime.engines import CHECKOUT, TINY, VOCAB_SIZE, Answered, ask, ask_all, engine_config, running
from tests.runtime.random_models import Case

from wherry_protocol.worker import Token
from wherry_runtime.engine.async_engine import AsyncEngine, ModelError
from wherry_runtime.engine.live import Live
from wherry_runtime.engine.speculative import speculator as speculator_module
from wherry_runtime.engine.speculative.policy import Candidate, Choice, Costs, Mode
from wherry_runtime.engine.speculative.speculator import Speculator

DRAFT = CHECKOUT / "examples" / "models" / "draft"
PROMPTS = [
    "The :meth:`get` method returns the value of the :meth:`get` method",
    "def __init__(self, name):\n        self.name = name\n\n    def __repr__(self):\n",
    "If you want to use the kernel's documentation",
    "1 2 3 4 1 2 3 4 1 2 3 4 1 2",
]


@pytest.fixture
def always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step has as many guesses as it can: what pays depends on the machine, and these tests must not."""

    def choose(candidates: Sequence[Candidate], *args: Any) -> Choice:
        return Choice(max_rounds(args), 0, 1.0)

    def max_rounds(args: tuple[int, Costs, int, int]) -> int:
        return args[2]

    monkeypatch.setattr(Speculator, "dozes", lambda self, running: False)
    monkeypatch.setattr(Speculator, "next_mode", lambda self, running: Mode.SPECULATE)
    monkeypatch.setattr(speculator_module, "choose", choose)
    monkeypatch.setattr(speculator_module, "trim", lambda chances, *_: [len(run) for run in chances])


def counts(engine: AsyncEngine) -> tuple[int, int]:
    """Drafted and accepted tokens."""
    speculator = engine._core.speculator
    assert speculator is not None
    return speculator.counts.drafted, speculator.counts.accepted


@asynccontextmanager
async def speculating(mode: str, model: Path = TINY, **settings: Any) -> AsyncIterator[AsyncEngine]:
    if mode in ("draft", "auto"):
        settings.setdefault("draft_model_uri", str(DRAFT))
    async with running(model, speculative=mode, **settings) as engine:
        yield engine
        draft = engine._core.speculator._draft
        if draft is not None:  # neither given up nor of a mode without one
            assert draft._blocks.num_free == draft._blocks.num_blocks
        assert not engine._core.speculator._indexes


class LogProb(float):
    """A batch of another size may differ in the last bits."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and abs(self - other) < 1e-3

    __hash__ = float.__hash__


def contents(answers: list[Answered]) -> list[Any]:
    """What clients see."""
    return [
        (
            a.ids,
            a.text,
            a.end.finish_reason,
            a.end.stop_reason,
            a.end.completion_tokens,
            [LogProb(p.sampled.logprob) for t in a.events if isinstance(t, Token) for p in t.logprobs],
        )
        for a in answers
    ]


NATIVE_BF16 = {"block_size": 16, "dtype": "bfloat16"}
PARAMS: list[dict[str, Any]] = [
    {"temperature": 0},
    {"temperature": 0.8, "seed": 11, "logprobs": 2},
    {"temperature": 1.0, "seed": 5, "top_p": 0.9, "top_k": 50, "frequency_penalty": 0.4, "min_tokens": 20},
    {"temperature": 0, "repetition_penalty": 1.2, "logit_bias": {11: 2.0}},
]


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    ("mode", "settings"),
    [("ngram", {}), ("draft", {}), ("auto", {}), ("auto", {"block_size": 16}), ("draft", NATIVE_BF16)],
    ids=["ngram", "draft", "auto", "auto-native", "draft-native-bfloat16"],
)
async def test_answers_are_the_same(mode: str, settings: dict[str, Any]) -> None:
    """In blocks of 16 on the native kernels, where there are any; and on PyTorch."""
    async with running(TINY, **settings) as engine:
        expected = [contents(await ask_all(engine, PROMPTS, max_tokens=40, **p)) for p in PARAMS]
        plain_steps = engine.load().steps_total
    async with speculating(mode, **settings) as engine:
        for params, right in zip(PARAMS, expected, strict=True):
            assert contents(await ask_all(engine, PROMPTS, max_tokens=40, **params)) == right
        drafted, accepted = counts(engine)
        assert drafted > accepted > 50
        assert (engine.load().draft_tokens_total, engine.load().accepted_tokens_total) == (drafted, accepted)
        assert engine.load().steps_total < plain_steps


async def test_answers_are_the_same_when_it_decides_for_itself() -> None:
    async with running(TINY) as engine:
        expected = contents(await ask_all(engine, PROMPTS, max_tokens=100, temperature=0))
    async with speculating("auto") as engine:
        for _ in range(3):
            assert contents(await ask_all(engine, PROMPTS, max_tokens=100, temperature=0)) == expected


@pytest.mark.usefixtures("always")
@pytest.mark.parametrize(
    "settings",
    [
        {"kv_blocks": 30, "prefix_cache": False},
        {"kv_blocks": 30},
        {"max_batched_tokens": 9},
        {"block_size": 1},
        {"max_draft_tokens": 1},
    ],
    ids=lambda s: ",".join(s),
)
async def test_answers_are_the_same_in_little_space(settings: dict[str, Any]) -> None:
    """Preemption, a budget smaller than the guesses, blocks that end anywhere."""
    async with running(TINY, max_running=4) as engine:
        expected = contents(await ask_all(engine, PROMPTS, max_tokens=50, temperature=0.7, seed=3))
    async with speculating("auto", max_running=4, **settings) as engine:
        assert contents(await ask_all(engine, PROMPTS, max_tokens=50, temperature=0.7, seed=3)) == expected
        assert counts(engine)[1] > 0
        if "kv_blocks" in settings:
            assert engine.load().preemptions_total > 0


@pytest.mark.usefixtures("always")
class TestEnds:
    """An answer ends where it would have ended, also in the middle of an accepted run."""

    async def test_max_tokens(self) -> None:
        async with speculating("auto") as engine:
            for limit in range(1, 8):
                answer = await ask(engine, PROMPTS[0], max_tokens=limit, temperature=0)
                assert len(answer.ids) == answer.end.completion_tokens == limit
                assert answer.end.finish_reason == "length"

    async def test_stop_tokens_and_strings(self) -> None:
        async with running(TINY) as engine:
            whole = await ask(engine, PROMPTS[0], max_tokens=40, temperature=0)
            stops: list[dict[str, Any]] = [{"stop_token_ids": [t]} for t in sorted(set(whole.ids))[:12]]
            stops += [{"stop": [whole.text[i : i + 3]]} for i in range(0, len(whole.text) - 3, 9)]
            stops += [{"stop_token_ids": [whole.ids[2]], "min_tokens": 10}]
            expected = [contents([await ask(engine, PROMPTS[0], max_tokens=40, temperature=0, **s)]) for s in stops]
        async with speculating("auto") as engine:
            for stop, right in zip(stops, expected, strict=True):
                answer = await ask(engine, PROMPTS[0], max_tokens=40, temperature=0, **stop)
                assert contents([answer]) == right, stop
            assert counts(engine)[1] > 20

    async def test_cancelling_frees_everything(self) -> None:
        async with speculating("auto") as engine:
            for i in range(4):
                before = counts(engine)[0]
                task = asyncio.create_task(
                    ask(engine, PROMPTS[i], request_id=f"c{i}", max_tokens=900, temperature=0, ignore_eos=True)
                )
                async with asyncio.timeout(20):
                    while counts(engine)[0] < before + 10:  # noqa: ASYNC110 - the engine offers no event for it
                        await asyncio.sleep(0.001)
                engine.cancel(f"c{i}")
                assert (await task).end.finish_reason == "cancelled"


@pytest.mark.usefixtures("always")
class TestFailures:
    async def test_a_draft_model_that_fails_is_no_failure(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with speculating("draft") as engine:
            right = contents(await ask_all(engine, PROMPTS, max_tokens=20, temperature=0))
            runner = engine._core.speculator._draft._runner
            whole, calls = runner.logits, 0

            def broken(sequences: Any) -> Any:
                nonlocal calls
                calls += 1
                if calls % 3 == 0:
                    raise RuntimeError("draft is broken")
                return whole(sequences)

            monkeypatch.setattr(runner, "logits", broken)
            assert contents(await ask_all(engine, PROMPTS, max_tokens=20, temperature=0)) == right
            assert "draft is broken" in caplog.text

    async def test_a_draft_model_that_always_fails_is_given_up(
        self, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        async with speculating("draft") as engine:
            draft = engine._core.speculator._draft

            def broken(sequences: Any) -> Any:
                raise RuntimeError("draft is broken")

            monkeypatch.setattr(draft._runner, "logits", broken)
            assert len((await ask(engine, PROMPTS[0], max_tokens=20, temperature=0)).ids) == 20
            assert "not used any more" in caplog.text
            assert caplog.text.count("draft is broken") == 3
            assert draft._blocks.num_free == draft._blocks.num_blocks

    async def test_a_draft_model_without_sense_is_no_failure(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with speculating("draft") as engine:
            right = contents(await ask_all(engine, PROMPTS, max_tokens=20, temperature=0.5, seed=1))
            runner = engine._core.speculator._draft._runner
            whole = runner.logits
            monkeypatch.setattr(runner, "logits", lambda s: (whole(s)[0] * float("nan"), whole(s)[1]))
            assert contents(await ask_all(engine, PROMPTS, max_tokens=20, temperature=0.5, seed=1)) == right

    async def test_a_step_that_fails_is_tried_again_one_by_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        async with speculating("auto") as engine:
            right = contents(await ask_all(engine, PROMPTS, max_tokens=20, temperature=0))
            runner = engine._core.runner
            whole = runner.run

            def broken(prepared: Any, live: dict[str, Live]) -> Any:
                if len({s.request_id for s in prepared.sequences}) > 1:
                    raise RuntimeError("only one at a time")
                return whole(prepared, live)

            monkeypatch.setattr(runner, "run", broken)
            assert contents(await ask_all(engine, PROMPTS, max_tokens=20, temperature=0)) == right

    @pytest.mark.parametrize("block_size", [1, 4, 16])
    async def test_a_wrong_guess_that_is_not_finite_leaves_nothing_behind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, block_size: int
    ) -> None:
        """Its key and value are NaN and would poison every later step that gathers them, masked or not."""
        poison = 77
        Case("untied", "Llama", {"tie_word_embeddings": False}).build(tmp_path)
        weights = load_file(tmp_path / "model.safetensors")
        weights["model.embed_tokens.weight"][poison] = float("nan")
        weights["lm_head.weight"][poison] = 0.0
        save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
        prompts = [[1, 2, 3], [5, 6, 7, 8, 9]]
        bias = {"logit_bias": {poison: -100.0}}
        async with running(tmp_path, block_size=block_size) as engine:
            expected = contents(await ask_all(engine, prompts, max_tokens=30, temperature=0, **bias))
        tries = 0

        def propose(self: Speculator, lives: Sequence[Live]) -> dict[str, list[int]]:
            nonlocal tries
            tries += 1
            self._runs = {}
            return {live.id: [3, poison, poison][tries % 2 :] for live in lives} if tries % 3 else {}

        monkeypatch.setattr(Speculator, "propose", propose)
        async with speculating("ngram", tmp_path, block_size=block_size) as engine:
            answers = await ask_all(engine, prompts, max_tokens=30, temperature=0, **bias)
            assert contents(answers) == expected
            assert counts(engine)[0] > 0


class TestSettings:
    async def refused(self, model: Path = TINY, **settings: Any) -> ModelError:
        engine = AsyncEngine(engine_config(model, **settings))
        with pytest.raises(ModelError) as failure:
            await engine.start()
        await engine.close()
        return failure.value

    async def test_a_draft_model_of_another_vocabulary(self, tmp_path: Path) -> None:
        Case("other", "Llama").build(tmp_path)
        error = await self.refused(speculative="draft", draft_model_uri=str(tmp_path))
        assert error.code == "draft_mismatch"
        assert f"{VOCAB_SIZE} tokens and the model 8192" in str(error)

    async def test_a_draft_model_of_another_tokenizer(self, tmp_path: Path) -> None:
        for path in DRAFT.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        raw = json.loads((tmp_path / "tokenizer.json").read_text())
        vocabulary = raw["model"]["vocab"]
        names = list(vocabulary)
        vocabulary[names[300]], vocabulary[names[301]] = vocabulary[names[301]], vocabulary[names[300]]
        (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
        error = await self.refused(speculative="auto", draft_model_uri=str(tmp_path))
        assert error.code == "draft_mismatch"
        assert "share the model's tokenizer" in str(error)

    @pytest.mark.parametrize(
        ("settings", "part"),
        [
            ({"speculative": "draft"}, "draft_model_uri"),
            ({"draft_model_uri": str(DRAFT)}, "use draft or auto"),
            ({"speculative": "ngram", "draft_model_uri": str(DRAFT)}, "use draft or auto"),
            ({"speculative": "ngram", "max_draft_tokens": 0}, "at least 1"),
        ],
    )
    async def test_settings_that_make_no_sense(self, settings: dict[str, Any], part: str) -> None:
        error = await self.refused(**settings)
        assert error.code == "bad_setting"
        assert part in str(error)

    async def test_a_draft_model_that_is_not_there(self) -> None:
        assert (await self.refused(speculative="draft", draft_model_uri="/nowhere")).code == "model_not_found"

    @pytest.mark.usefixtures("always")
    async def test_a_draft_model_with_a_shorter_context(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        for path in DRAFT.iterdir():
            (tmp_path / path.name).write_bytes(path.read_bytes())
        raw = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**raw, "max_position_embeddings": 40}))
        async with running(TINY) as engine:
            expected = contents(await ask_all(engine, PROMPTS, max_tokens=60, temperature=0))
        async with speculating("draft", draft_model_uri=str(tmp_path)) as engine:
            assert contents(await ask_all(engine, PROMPTS, max_tokens=60, temperature=0)) == expected
            assert counts(engine)[0] > 0
        assert "the draft model's context is 40" in caplog.text

    async def test_the_draft_models_cache_is_counted(self) -> None:
        """Where memory decides, both caches share it."""
        async with speculating("draft", max_running=2) as engine:
            draft = engine._core.speculator._draft
            assert draft._blocks.num_blocks >= engine._core.scheduler.blocks.num_blocks
