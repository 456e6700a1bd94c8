"""The comparison of engines: what it makes of figures, and one real process of it."""

import json
import time
from pathlib import Path
from typing import Any

import pytest
from benchmarks.engine import models, peers, report, variants
from benchmarks.engine.process import EngineFailed, EngineProcess
from benchmarks.engine.turns import Company
from benchmarks.engine.workload import Job


def run(number: int, engine: str, variant: str, one: float, prefill: float = 100.0, **more: Any) -> dict[str, Any]:
    rates = {"decode": {"1": {"rate": one}, "8": {"rate": 8 * one}}, "prefill": {"512": {"rate": prefill}}}
    base = {"round": number, "engine": engine, "variant": variant, "memory": {"rss": 10**9}, "bandwidth": 4e10}
    return {**base, "settings": {"version": "1"}, **rates, **more}


def results(*runs: dict[str, Any]) -> dict[str, Any]:
    machine = {"processor": "P", "threads": 2}
    return {
        "model": "1.1b",
        "date": "2026-01-01",
        "command": "c",
        "machine": machine,
        "runs": list(runs),
    }


def test_ratios_are_taken_within_a_round() -> None:
    text = report.ratios_table(
        results(
            run(0, "wherry", "int8", 40.0),
            run(0, "llamacpp", "q8_0", 20.0),
            run(1, "wherry", "int8", 10.0),
            run(1, "llamacpp", "q8_0", 4.0),
        )
    )
    row = next(line for line in text.splitlines() if "int8, batch 1" in line)
    assert "2.25 (2.00 to 2.50)" in row
    assert "Wherry int8 / llama.cpp Q8_0" in row


def test_the_peers_better_pipeline_counts() -> None:
    data = results(
        run(0, "wherry", "int8", 40.0), run(0, "openvino", "int8+cb", 5.0), run(0, "openvino", "int8+plain", 20.0)
    )
    assert "2.00 (2.00 to 2.00)" in report.ratios_table(data)
    table = report.rates_table(data)
    assert table.count("OpenVINO GenAI int8") == 1
    assert "20.0 (20.0 to 20.0)" in table


def test_share_of_bandwidth_is_of_the_same_turn() -> None:
    data = results(run(1, "wherry", "int8", 40.0, settings={"read_per_step": 5e8}))
    row = next(line for line in report._own_rows(data) if "bandwidth" in line[0])
    assert row[-1] == "50% (50% to 50%)"


def test_two_speeds_of_memory_are_told_apart() -> None:
    turns = [("wherry", "int8", 3e10, 28.0), ("wherry", "int8", 6e10, 50.0), ("wherry", "int8", 6e10, 52.0)]
    turns += [("llamacpp", "q8_0", 3e10, 25.0), ("llamacpp", "q8_0", 6e10, 30.0)]
    data = results(*(run(i, engine, name, rate, bandwidth=b) for i, (engine, name, b, rate) in enumerate(turns)))
    row = next(line for line in report.by_memory_table(data).splitlines() if "Q8_0" in line)
    assert row == "| Wherry int8 / llama.cpp Q8_0 | 28.0 / 25.0 = 1.12 | 51.0 / 30.0 = 1.70 |"
    assert report.by_memory_table(results(run(0, "wherry", "int8", 1.0))) == ""


def test_tables_go_where_the_page_says() -> None:
    page = "a\n<!-- table: 1.1b -->\nold\n<!-- end -->\n<!-- table: 0.5b -->\nkept\n<!-- end -->\n"
    filled = report.fill(page, "1.1b", "new \\1")
    assert "new \\1" in filled
    assert "old" not in filled
    assert "kept" in filled
    assert report.fill(filled, "1.1b", "new \\1") == filled
    with pytest.raises(ValueError, match="no lines"):
        report.fill(page, "7b", "x")


def test_picture_has_a_line_for_each_format() -> None:
    svg = report.picture(results(run(0, "wherry", "int8", 1.0), run(0, "llamacpp", "q4_k_m", 2.0)))
    assert "Wherry int8" in svg
    assert "llama.cpp Q4_K_M" in svg


@pytest.mark.parametrize("name, parameters", [("1.1b", 1_100_048_384), ("0.5b", 494_032_768)])
def test_shapes_have_the_parameters_they_are_named_for(name: str, parameters: int) -> None:
    total = 0
    for _, shape in models.tensor_shapes(models.SHAPES[name]):
        size = 1
        for width in shape:
            size *= width
        total += size
    assert total == parameters


def tiny_job(**changes: Any) -> Job:
    base: dict[str, Any] = {
        "engine": "wherry",
        "variant": "bf16",
        "model": str(models.SAMPLE),
        "weights": str(models.SAMPLE),
        "vocab_size": models.vocab_size(models.SAMPLE),
        "threads": 1,
        "prefill": (16,),
        "batches": (1, 2),
        "prompt_tokens": 8,
        "new_tokens": 60,
    }
    return Job(**{**base, **changes})


@pytest.mark.parametrize("engine", ["wherry", "transformers"])
def test_a_process_measures_and_reports(engine: str) -> None:
    with EngineProcess(tiny_job(engine=engine)) as process:
        decoded = process.ask(kind="decode", size=2, number=0)
        assert decoded["steps"] == 55
        assert decoded["rate"] > 0
        assert process.ask(kind="prefill", size=16, number=0)["rate"] > 0
        assert process.loaded["memory"]["rss"] > 1e7
        status, deadline = Path(f"/proc/{process._process.pid}/status"), time.monotonic() + 30
        while "State:\tT" not in status.read_text():  # stopped until it is asked again
            assert time.monotonic() < deadline


def test_a_process_that_fails_tells_why(tmp_path: Path) -> None:
    with pytest.raises(EngineFailed, match="no such place"):
        EngineProcess(tiny_job(model=str(tmp_path / "no such place")))


def test_a_company_goes_on_without_those_who_die(tmp_path: Path) -> None:
    failed: list[str] = []
    jobs = [tiny_job(), tiny_job(variant="lost", model=str(tmp_path / "no such place")), tiny_job(variant="killed")]
    with Company(jobs, failed=lambda job, error: failed.append(job.variant), loading=lambda job: None) as company:
        assert failed == ["lost"]
        for job in company.turns("decode", 1, 2):
            if job.variant == "killed":
                next(engine for j, engine in company._engines if j is job)._process.kill()
        assert failed == ["lost", "killed"]
        assert [(r["variant"], r["round"]) for r in company.runs] == [("bf16", 0), ("bf16", 1)]
        assert all(r["decode"]["1"]["rate"] > 0 and r["bandwidth"] > 0 for r in company.runs)


def test_prompts_are_the_same_for_everyone_and_new_each_round() -> None:
    assert tiny_job().prompts(2, 8) == tiny_job(engine="llamacpp").prompts(2, 8)
    assert tiny_job().prompts(1, 8, salt=1) != tiny_job().prompts(1, 8)


def test_peers_that_are_not_installed_are_left_out(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(peers, "PEERS", tmp_path)
    assert {v.engine for v in variants.every()} == {"wherry", "transformers"}
    (tmp_path / "llamacpp").mkdir()
    note = tmp_path / "llamacpp" / "requirements.txt"
    note.write_text("\n".join(peers.ENVIRONMENTS["llamacpp"].requirements) + "\n")
    assert {v.engine for v in variants.every()} == {"wherry", "llamacpp", "transformers"}
    note.write_text("llama-cpp-python==0.0.1\n")
    assert not peers.installed("llamacpp")


def test_a_report_from_files(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    file, page = tmp_path / "r.json", tmp_path / "p.md"
    file.write_text(json.dumps(results(run(0, "wherry", "int8", 1.0))))
    page.write_text("<!-- table: 1.1b -->\n<!-- end -->\n")
    monkeypatch.setattr("sys.argv", ["report", str(file)])
    report.main()
    assert "Wherry int8" in capsys.readouterr().out
    monkeypatch.setattr("sys.argv", ["report", str(file), "--page", str(page)])
    report.main()
    assert "Wherry int8" in page.read_text()
