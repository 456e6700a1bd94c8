"""The simulated engine: what it computes when, how long it takes, and what it finds in its cache."""

import pytest

from wherry_cli.simulated_model import (
    END_OF_ANSWER,
    Costs,
    Job,
    Shape,
    Simulation,
    encode,
    encode_chat,
    natural_length,
    text_of,
    token_at,
)
from wherry_protocol.worker import ChatMessage
from wherry_runtime.scheduling.plan import Work
from wherry_runtime.scheduling.request import Request
from wherry_runtime.scheduling.scheduler import DoesNotFitError, QueueFullError

COSTS = Costs(step=10.0, decode=1.0, context=0.0, prefill=0.1)
SHAPE = Shape(max_running=4, max_queued=2, max_batched_tokens=100, max_itl_ratio=0, kv_tokens=1600, block_size=16)


def job(key: str, prompt: list[int], tokens: int, *, priority: int = 0, begun: int = 0) -> Job:
    drawn = [token_at(1, index) for index in range(begun)]
    request = Request(id=key, tokens=prompt + drawn, max_new_tokens=tokens, priority=priority, num_resumed=begun)
    return Job(request, seed=1, length=tokens, finish="length")


def play(simulation: Simulation, steps: int = 10_000) -> tuple[list[float], dict[str, list[int]]]:
    """What each step took, and each job's tokens, until there is nothing to do."""
    took: list[float] = []
    tokens: dict[str, list[int]] = {}
    for _ in range(steps):
        step = simulation.plan()
        if step is None:
            return took, tokens
        took.append(round(step.seconds, 6))
        for progress in simulation.finish():
            tokens.setdefault(progress.key, []).append(progress.token)
    raise AssertionError(f"not done after {steps} steps")


def words(count: int, of: int = 0) -> list[int]:
    return [of * 1_000_000 + index for index in range(count)]


@pytest.mark.parametrize(
    "work, seconds",
    [
        (Work(), 10.0),
        (Work(decodes=3, decode_context=300), 13.0),
        (Work(prefill_tokens=50), 15.0),
        (Work(decodes=2, decode_context=10, prefill_tokens=20), 14.0),
    ],
)
def test_a_step_costs_what_it_computes(work: Work, seconds: float) -> None:
    assert COSTS.seconds(work) == pytest.approx(seconds)
    assert COSTS.scaled(10).seconds(work) == pytest.approx(seconds / 10)


def test_context_costs_too() -> None:
    assert Costs(step=0, decode=0, prefill=0, context=0.5).seconds(Work(2, 8, 5)) == 4.0


@pytest.mark.parametrize(
    "prompts, tokens, took",
    [
        ([50], 3, [15.0, 11.0, 11.0]),  # the prompt, then a token a step
        ([50, 40], 2, [19.0, 12.0]),  # both prompts in one step
        ([250], 1, [20.0, 20.0, 15.0]),  # chunks of 100
        ([90, 90], 2, [20.0, 19.0, 11.0]),  # 10 of the second one's beside the first; then 80 and a decode
    ],
)
def test_prompts_are_chunked_and_batched(prompts: list[int], tokens: int, took: list[float]) -> None:
    simulation = Simulation(SHAPE, COSTS)
    for number, length in enumerate(prompts):
        simulation.submit(job(str(number), words(length, of=number), tokens))
    found, answers = play(simulation)
    assert found == took
    assert {key: len(answer) for key, answer in answers.items()} == {str(n): tokens for n in range(len(prompts))}
    assert simulation.prompt_tokens == sum(prompts)
    assert simulation.completion_tokens == tokens * len(prompts)


def test_what_is_cached_is_not_computed_again() -> None:
    simulation = Simulation(SHAPE, COSTS)
    simulation.submit(job("a", words(64), 1))
    assert play(simulation)[0] == [16.4]
    second = job("b", [*words(48), *words(16, of=7)], 1)
    simulation.submit(second)
    assert play(simulation)[0] == [11.6]  # 16 tokens
    assert second.request.cached_tokens == 48


def test_the_cache_forgets_what_was_used_longest_ago() -> None:
    simulation = Simulation(SHAPE, COSTS)
    hits = []
    for prompt in (0, 1, 0, 2, 0, 1):  # each needs half of the cache and a block for its answer
        one = job(f"{len(hits)}", words(784, of=prompt), 1)
        simulation.submit(one)
        play(simulation)
        hits.append(one.request.cached_tokens)
    assert hits[0] == hits[1] == hits[3] == 0
    assert hits[2] == hits[4] == 768
    assert hits[5] < 100  # the beginning goes last


def test_the_queue_is_bounded() -> None:
    simulation = Simulation(SHAPE, COSTS)
    for number in range(6):
        simulation.submit(job(str(number), words(10, of=number), 5))
    with pytest.raises(QueueFullError):
        simulation.submit(job("6", words(10), 5))
    simulation.plan()
    assert (len(simulation.scheduler.running), len(simulation.scheduler.waiting)) == (4, 2)


def test_what_can_never_fit_is_refused() -> None:
    with pytest.raises(DoesNotFitError):
        Simulation(SHAPE, COSTS).submit(job("a", words(1600), 1))


def test_a_full_cache_preempts_and_everybody_ends() -> None:
    simulation = Simulation(SHAPE, COSTS)
    for number in range(3):
        simulation.submit(job(str(number), words(500, of=number), 100))
    _, answers = play(simulation)
    assert simulation.scheduler.preemptions > 0
    assert [answers[key] for key in sorted(answers)] == [[token_at(1, i) for i in range(100)]] * 3
    simulation.scheduler.check_integrity()


def test_higher_priority_goes_first() -> None:
    simulation = Simulation(SHAPE, COSTS)
    for number in range(5):
        simulation.submit(job(str(number), words(90, of=number), 1, priority=number))
    first = simulation.plan()
    assert first is not None
    assert first.admitted == ["4", "3"]  # of the second one, what is left of the step


def test_a_cancelled_job_gets_nothing() -> None:
    simulation = Simulation(SHAPE, COSTS)
    simulation.submit(job("a", words(10), 5))
    simulation.plan()
    assert simulation.cancel("a")
    assert not simulation.cancel("a")
    assert simulation.finish() == []
    assert simulation.plan() is None
    simulation.scheduler.check_integrity()
    assert simulation.scheduler.blocks.num_free == 100


def test_an_answer_goes_on_where_another_replica_ended() -> None:
    whole, rest = Simulation(SHAPE, COSTS), Simulation(SHAPE, COSTS)
    whole.submit(job("a", words(20), 9))
    rest.submit(job("a", words(20), 9, begun=4))
    assert play(whole)[1]["a"][4:] == play(rest)[1]["a"]


def test_an_answer_that_ends_by_itself_ends_with_its_end() -> None:
    simulation = Simulation(SHAPE, COSTS)
    one = job("a", words(20), 9)
    one.length, one.finish = 3, "stop"
    simulation.submit(one)
    _, answers = play(simulation)
    assert answers["a"] == [token_at(1, 0), token_at(1, 1), END_OF_ANSWER]
    assert len(text_of(answers["a"])) == 8
    assert simulation.scheduler.idle


def test_lengths_scatter_around_their_mean() -> None:
    lengths = [natural_length(seed, 100) for seed in range(5000)]
    assert 95 < sum(lengths) / len(lengths) < 105
    assert min(lengths) >= 1
    assert max(lengths) > 500
    assert natural_length(7, 100) == natural_length(7, 100)


def test_equal_beginnings_are_equal_tokens() -> None:
    assert encode("abcdefgh") == encode("abcdefghi")[:2]
    assert encode("abcdefghi") == encode("abcdefghi   ")
    assert len(encode("ä" * 6)) == 3
    assert encode("") == []


def test_a_conversation_that_goes_on_begins_with_all_it_had() -> None:
    turns = [ChatMessage(role="system", content="Be brief."), ChatMessage(role="user", content="Hello, you!")]
    before = encode_chat(turns)
    answer = [token_at(3, index) for index in range(10)]
    turns += [ChatMessage(role="assistant", content=text_of(answer)), ChatMessage(role="user", content="And?")]
    assert encode_chat(turns)[: len(before) + 10] == before + answer
