"""`wherry eval` and `wherry quantize`: what they measure and write, against transformers and by hand."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from tests.runtime.engines import CHECKOUT, TINY
from tests.runtime.random_models import Case
from typer.testing import CliRunner

from wherry_cli.main import app
from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.quality.measure import Subject, compare, compare_answers
from wherry_runtime.quality.score import Score
from wherry_runtime.tokenization.tokenizer import Tokenizer
from wherry_runtime.tokenization.windows import windows

TEXT = CHECKOUT / "benchmarks" / "data" / "dev.txt"
CALIBRATION = CHECKOUT / "benchmarks" / "data" / "calibration.txt"


def subject(directory: Path, length: int, **settings: object) -> Subject:
    return Subject(EngineConfig(model_name="m", model_uri=str(directory), threads=1, **settings), length)  # type: ignore[arg-type]


def test_a_score_by_hand() -> None:
    score = Score()
    score.add([1.0, 2.0], [5, 6], [0.5, 2.0], [5, 7], 0.3)
    score.add([3.0], [1], [3.5], [1], 0.3)
    found = score.summary()
    assert found.perplexity == pytest.approx(math.exp(2.0))
    assert found.change == pytest.approx(0.0)
    assert found.error == pytest.approx(math.sqrt((0.25 + 0.25) / 3 / 3))
    assert found.agreement == pytest.approx(2 / 3)
    assert found.divergence == pytest.approx(0.2)
    assert found.positions == 3


def test_perplexity_and_divergence_are_those_of_transformers() -> None:
    chosen = windows(TEXT, Tokenizer(TINY), 2, 160)  # more rows than the engine draws from at once
    exact, rough = subject(TINY, 160, dtype="float32"), subject(TINY, 160, dtype="float32", quantization="int4")
    found = compare(rough.scorer, exact.scorer, chosen, lambda: None).summary()
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    with torch.inference_mode():
        logprobs = model(torch.tensor(chosen)).logits[:, :-1].log_softmax(-1)
    expected = -logprobs.gather(-1, torch.tensor(chosen)[:, 1:, None]).mean()
    alone = compare(exact.scorer, None, chosen, lambda: None).summary()
    assert alone.perplexity == pytest.approx(math.exp(expected), rel=1e-4)
    assert (alone.divergence, alone.agreement, alone.positions) == (0.0, 1.0, 2 * 159)
    assert found.perplexity / (1 + found.change) == pytest.approx(alone.perplexity, rel=1e-6)
    ours = torch.stack([torch.cat(list(rough.scorer.logprobs(w))) for w in chosen])
    kl = (logprobs.exp() * (logprobs - ours)).sum(-1).mean()
    assert found.divergence == pytest.approx(float(kl), rel=0.01)
    assert 0.0001 < found.divergence < 0.01


def test_answers_are_those_of_transformers() -> None:
    chosen = windows(TEXT, Tokenizer(TINY), 10, 40)  # two rounds of answers
    exact = subject(TINY, 40, dtype="float32")
    model = transformers.AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    prompts = torch.tensor([w[:32] for w in chosen[:8]])
    expected = model.generate(prompts, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[:, 32:]
    assert exact.scorer.answers(prompts.tolist(), 8) == expected.tolist()
    same = compare_answers(exact.scorer, exact.scorer, chosen, 8, lambda: None)
    assert (same.equal, same.tokens, same.answers) == (1.0, 1.0, 10)
    rough = subject(TINY, 40, dtype="float32", quantization="int4")
    other = compare_answers(rough.scorer, exact.scorer, chosen, 8, lambda: None)
    assert 0 < other.tokens < 1
    assert other.equal <= other.tokens


def test_the_commands(tmp_path: Path) -> None:
    """From a model to a smaller one, and what that cost."""
    target, file = tmp_path / "small", tmp_path / "found.json"
    calibrate = ["--method", "gptq", "--calibration", str(CALIBRATION), "--windows", "2", "--length", "64"]
    made = CliRunner().invoke(app, ["quantize", "sample://tiny", str(target), *calibrate])
    assert made.exit_code == 0, made.output
    assert "of 16.0 MB" in made.stdout
    asked = ["--text", str(TEXT), "--windows", "2", "--length", "64", "--threads", "1", "--json", str(file)]
    for command, row in (("perplexity", "perplexity"), ("kl", "divergence"), ("tokens", "equal")):
        more = ["--reference", "sample://tiny"] if command != "perplexity" else []
        more += ["--new-tokens", "8"] if command == "tokens" else []
        shown = CliRunner().invoke(app, ["eval", command, str(target), *asked, *more])
        assert shown.exit_code == 0, shown.output
        found = json.loads(file.read_text())
        assert found["text"] == "dev.txt"
        assert found["model"][row] > 0
        if command == "kl":
            assert found["reference"]["perplexity"] != found["model"]["perplexity"]
            assert found["model"]["weights"] < found["reference"]["weights"]


@pytest.mark.parametrize(
    "command, arguments, message",
    [
        ("eval", ["perplexity", "sample://tiny", "--text", "none.txt"], "none.txt: No such file"),
        ("eval", ["kl", "{other}", "--reference", "sample://tiny", "--text", "{text}"], "different tokenizers"),
        ("eval", ["kl", "sample://tiny", "--text", "{text}", "--windows", "100000"], "100000 are asked for"),
        ("quantize", ["sample://tiny", "{out}", "--method", "best"], "'best' is no method of quantizing; there are"),
        ("quantize", ["sample://tiny", "{out}", "--method", "gptq"], "give it a text with --calibration FILE"),
        ("quantize", ["sample://tiny", "{out}", "--method", "fp8", "--calibration", "{text}"], "fp8 needs no text"),
        ("quantize", ["sample://tiny", "{out}", "--method", "gptq", "--bits", "5"], "gptq has no bits 5"),
        ("quantize", ["sample://tiny", "{other}", "--method", "int8"], "is there already"),
        ("quantize", ["/none", "{out}", "--method", "int8"], "there is no directory /none"),
    ],
)
def test_what_is_wrong_is_said(command: str, arguments: list[str], message: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    if "{other}" in arguments:
        other.mkdir()
        Case("other", "Llama", {"num_hidden_layers": 1, "max_position_embeddings": 2048}).build(other)
    known = {"{other}": str(other), "{text}": str(TEXT), "{out}": str(tmp_path / "out")}
    result = CliRunner().invoke(app, [command, *(known.get(a, a) for a in arguments)])
    assert result.exit_code == 1
    assert message in " ".join(result.output.split()), result.output
    assert not (tmp_path / "out").exists()
