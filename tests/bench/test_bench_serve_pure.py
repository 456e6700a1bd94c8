"""The load generator's decisions: when, what, and what the measurements come to."""

import itertools
import json
from pathlib import Path

import pytest

from wherry_cli import bench_serve
from wherry_cli.bench_arrivals import Record, TraceError, arrivals, read_trace
from wherry_cli.bench_flags import Failure, Pattern, ServeFlags, Workload
from wherry_cli.bench_stats import Outcome, Slo, percentile, slices, spread, summarize
from wherry_cli.bench_workloads import (
    Conversation,
    Kind,
    Lengths,
    PromptsError,
    Turn,
    bounded,
    made_up,
    of_file,
    of_trace,
)
from wherry_cli.simulated_model import encode


def first(pattern: Pattern, rate: float, count: int, burst: int = 1, seed: int = 0) -> list[float]:
    return list(itertools.islice(arrivals(pattern, rate, burst, seed), count))


@pytest.mark.parametrize(
    "pattern, burst, times",
    [
        ("constant", 1, [0.0, 0.5, 1.0, 1.5]),
        ("constant", 9, [0.0, 0.5, 1.0, 1.5]),
        ("burst", 1, [0.0, 0.5, 1.0, 1.5]),
        ("burst", 3, [0.0, 0.0, 0.0, 1.5]),
    ],
)
def test_even_arrivals(pattern: Pattern, burst: int, times: list[float]) -> None:
    assert first(pattern, 2.0, 4, burst) == times


def test_poisson_arrivals_keep_their_rate_and_scatter() -> None:
    times = first("poisson", 50.0, 10_000)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    assert 195 < times[-1] < 205
    mean = sum(gaps) / len(gaps)
    assert sum((gap - mean) ** 2 for gap in gaps) / len(gaps) == pytest.approx(mean**2, rel=0.1)
    assert times[:50] == first("poisson", 50.0, 50)
    assert times[:50] != first("poisson", 50.0, 50, seed=1)


AZURE = (
    "TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46.6805900,374,44\n2023-11-16 18:15:50.9951690,396,109\n"
)
BURSTGPT = (
    "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n5,ChatGPT,472,18,490,x\n45,GPT-4,1,2,3,x\n"
)
MOONCAKE = (
    '{"timestamp": 0, "input_length": 1024, "output_length": 9, "hash_ids": [7, 8]}\n'
    '{"timestamp": 3052, "input_length": 700, "output_length": 5, "hash_ids": [7, 9]}\n'
)


@pytest.mark.parametrize(
    "name, text, records",
    [
        ("azure.csv", AZURE, [Record(0, 374, 44), Record(4.314579, 396, 109)]),
        ("burstgpt.csv", BURSTGPT, [Record(0, 472, 18), Record(40, 1, 2)]),
        ("mooncake.jsonl", MOONCAKE, [Record(0, 1024, 9, (7, 8)), Record(3.052, 700, 5, (7, 9))]),
    ],
)
def test_published_traces_are_read(tmp_path: Path, name: str, text: str, records: list[Record]) -> None:
    (tmp_path / name).write_text(text)
    found = read_trace(tmp_path / name)
    assert [record.at_s for record in found] == pytest.approx([record.at_s for record in records], abs=1e-6)
    assert [(r.input_tokens, r.output_tokens, r.blocks) for r in found] == [
        (r.input_tokens, r.output_tokens, r.blocks) for r in records
    ]
    assert read_trace(tmp_path / name, speed=2)[1].at_s == pytest.approx(records[1].at_s / 2, abs=1e-6)


def test_a_traces_unit_can_be_told(tmp_path: Path) -> None:
    file = tmp_path / "trace.jsonl"
    file.write_text(MOONCAKE)
    assert read_trace(file, "s")[1].at_s == 3052


@pytest.mark.parametrize(
    "name, text, told",
    [
        ("a.csv", "when,input_tokens,output_tokens\n1,2,3\n", "line 2: it has none of the columns timestamp"),
        ("a.csv", "timestamp,input_tokens\n1,2\n", "none of the columns generatedtokens"),
        ("a.csv", "timestamp,input_tokens,output_tokens\nsoon,2,3\n", "line 2"),
        ("a.csv", "timestamp,input_tokens,output_tokens\n", "no requests"),
        ("a.jsonl", '{"timestamp": 1,\n', "cannot read"),
        ("a.jsonl", "[1]\n", "line 1 is not a JSON object"),
    ],
)
def test_a_trace_that_cannot_be_replayed_is_told(tmp_path: Path, name: str, text: str, told: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(TraceError, match=told):
        read_trace(tmp_path / name)


LENGTHS = Lengths(input_tokens=40, output_tokens=10, prefixes=3, prefix_tokens=100, turns=4, think_s=2.0)


@pytest.mark.parametrize("kind, turns, before", [("random", 1, 0), ("shared-prefix", 1, 1), ("multi-turn", 4, 1)])
def test_made_up_conversations(kind: Kind, turns: int, before: int) -> None:
    found = list(itertools.islice(made_up(kind, LENGTHS, 5), 50))
    assert {(len(c.turns), len(c.before)) for c in found} == {(turns, before)}
    assert {len(encode(turn.text)) for c in found for turn in c.turns} == {40}
    assert len({turn.text for c in found for turn in c.turns}) == 50 * turns  # nothing is shared but the prefixes
    assert {len(encode(c.before[0][1])) for c in found if before} <= {100}
    assert len({c.before[0] for c in found if before}) == 3 * before
    assert all(c.turns[0].think_s == 0 for c in found)
    assert found == list(itertools.islice(made_up(kind, LENGTHS, 5), 50))
    assert found != list(itertools.islice(made_up(kind, LENGTHS, 6), 50))


def test_prefixes_can_be_skewed_and_lengths_scatter() -> None:
    lengths = Lengths(input_tokens=100, output_tokens=10, spread=0.5, prefixes=4, prefix_tokens=8, prefix_skew=2.0)
    found = list(itertools.islice(made_up("shared-prefix", lengths, 0), 2000))
    popular = max(sum(c.before == one.before for c in found) for one in found[:20])
    assert 0.65 < popular / 2000 < 0.75  # 1 / (1 + 1/4 + 1/9 + 1/16)
    sizes = [len(encode(c.turns[0].text)) for c in found]
    assert 50 <= min(sizes) < 60
    assert 140 < max(sizes) <= 150


def test_a_traces_blocks_are_equal_text() -> None:
    one, two, own = of_trace([Record(0, 1024, 9, (7, 8)), Record(1, 700, 5, (7, 9)), Record(2, 700, 5)], 0)
    texts = [encode(c.turns[0].text) for c in (one, two, own)]
    assert [len(text) for text in texts] == [1024, 700, 700]
    assert texts[0][:512] == texts[1][:512]
    assert texts[0][512:600] != texts[1][512:600]
    assert texts[2][:512] != texts[0][:512]
    assert two.turns[0].output_tokens == 5


@pytest.mark.parametrize("requests, turns", [(None, [3, 3, 3]), (1, [1]), (3, [3]), (7, [3, 3, 1]), (99, [3, 3, 3])])
def test_the_number_of_requests_is_bounded(requests: int | None, turns: list[int]) -> None:
    conversations = [Conversation([Turn("x", 1)] * 3)] * 3
    assert [len(c.turns) for c in bounded(conversations, requests)] == turns


def test_prompts_of_a_file(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    lines = ["plain words", json.dumps({"prompt": "p", "output_tokens": 3}), "", json.dumps({"messages": messages})]
    file.write_text("\n".join(lines))
    assert of_file(file, 8) == [
        Conversation([Turn("plain words", 8)]),
        Conversation([Turn("p", 3)]),
        Conversation([Turn("u", 8)], [("system", "s")]),
    ]


@pytest.mark.parametrize(
    "line, told",
    [
        ("{broken", "line 1"),
        ('{"text": "x"}', "lacks 'prompt'"),
        ('{"messages": []}', "line 1"),
        ('{"messages": [{"role": "assistant", "content": "x"}]}', "has to be the user's"),
        ('{"prompt": "x", "output_tokens": 0}', "positive"),
        ("", "no prompts"),
    ],
)
def test_prompts_that_cannot_be_used_are_told(tmp_path: Path, line: str, told: str) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text(line)
    with pytest.raises(PromptsError, match=told):
        of_file(file, 8)


def outcome(
    at: float, ttft: float = 0.1, tokens: int = 11, gap: float = 0.02, failure: str = "", late: float = 0
) -> Outcome:
    end = at + ttft + gap * (tokens - 1)
    return Outcome(
        scheduled=at,
        sent=at + late,
        first=None if failure else at + ttft,
        end=end,
        prompt_tokens=100,
        output_tokens=0 if failure else tokens,
        gaps=[gap] * (tokens - 1),
        failure=failure,
    )


@pytest.mark.parametrize(
    "values, share, expected", [([1], 99, 1), ([1, 2], 50, 1), ([1, 2, 3, 4], 90, 4), (list(range(1, 101)), 99, 99)]
)
def test_percentiles_are_values_that_were_measured(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


def test_nothing_measured_is_no_number() -> None:
    assert spread([]).percentiles == {"p50": None, "p90": None, "p95": None, "p99": None}
    empty = summarize([], Slo())
    assert (empty.sent, empty.requests_per_s, empty.good_share, empty.ttft.mean) == (0, 0, 0, None)


def test_a_summary_counts_failures_and_rates() -> None:
    outcomes = [outcome(0), outcome(1), outcome(2, failure="HTTP 429"), outcome(9.7)]
    summary = summarize(outcomes, Slo())
    assert (summary.sent, summary.complete, summary.failed, summary.failures) == (4, 3, 1, {"HTTP 429": 1})
    assert summary.seconds == pytest.approx(10.0)
    assert summary.requests_per_s == pytest.approx(0.3)
    assert summary.output_tokens_per_s == pytest.approx(3.3)
    assert summary.ttft.percentiles["p99"] == pytest.approx(0.1)
    assert summary.per_token.mean == pytest.approx(0.02)


@pytest.mark.parametrize(
    "slo, good",
    [
        (Slo(), 3),
        (Slo(ttft_s=0.2), 2),
        (Slo(itl_s=0.03), 2),
        (Slo(ttft_s=0.2, itl_s=0.03), 1),
        (Slo(ttft_s=0.01), 0),
    ],
)
def test_goodput_is_what_keeps_every_limit(slo: Slo, good: int) -> None:
    outcomes = [outcome(0), outcome(1, ttft=0.5), outcome(2, gap=0.05), outcome(3, failure="cut off")]
    summary = summarize(outcomes, slo)
    assert summary.good == good
    assert summary.good_share == good / 4


def test_lateness_of_the_generator_is_in_every_latency() -> None:
    summary = summarize([outcome(0, ttft=0.4, late=0.3)], Slo())
    assert summary.ttft.mean == pytest.approx(0.4)  # from when it was due, not from when it was sent
    assert summary.late.mean == pytest.approx(0.3)


def test_the_test_is_cut_into_slices() -> None:
    parts = slices([outcome(at) for at in (0, 1, 5, 10)], 10)
    assert [(part.at, len(part.outcomes)) for part in parts] == [(0.5, 1), (1.5, 1), (5.5, 1), (9.5, 1)]
    assert slices([]) == []
    assert len(slices([outcome(3), outcome(3)])) == 1


@pytest.mark.parametrize(
    "workload, file, told",
    [
        ("trace", None, "name it with --file"),
        ("file", None, "name it with --file"),
        ("random", Path("x"), "--file is read with"),
        ("trace", Path("/nowhere.csv"), "cannot read the trace"),
        ("file", Path("/nowhere.txt"), "cannot read the prompts"),
        ("random", None, "cannot reach"),
    ],
)
def test_what_cannot_be_tested_is_told(workload: Workload, file: Path | None, told: str) -> None:
    with pytest.raises(Failure, match=told):
        bench_serve.make_plan(ServeFlags(url="http://127.0.0.1:9", workload=workload, file=file))
