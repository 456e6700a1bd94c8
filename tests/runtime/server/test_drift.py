"""What a worker tells of what rounding cost its model: measured once it is ready, in a process of its own."""

import asyncio
from pathlib import Path

import httpx
import psutil
import pytest
from tests.router.harness import TINY, Process, eventually, running

from wherry_protocol.engine_config import EngineConfig, Quantization, from_args
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.quality.drift import LENGTH, Measured, measure
from wherry_runtime.quality.measure import Subject, compare
from wherry_runtime.quality.text import TEXT
from wherry_runtime.server import drift
from wherry_runtime.server import run as worker
from wherry_runtime.server.surface import Rounded
from wherry_runtime.tokenization.tokenizer import Tokenizer

PLENTY = 8 << 30


def subject(quantization: Quantization) -> Subject:
    config = EngineConfig(
        model_uri=str(TINY), model_name="m", dtype="float32", quantization=quantization, threads=1, backend="pytorch"
    )
    return Subject(config, LENGTH)


@pytest.mark.parametrize(("quantization", "least", "most"), [("int8", 0.00002, 0.0005), ("int4", 0.0004, 0.005)])
def test_it_is_what_the_engine_does_on_the_same_text(quantization: Quantization, least: float, most: float) -> None:
    tokens = Tokenizer(TINY).encode(TEXT)[:LENGTH]
    assert len(tokens) == LENGTH, "the text is long enough"
    theirs = compare(subject(quantization).scorer, subject("none").scorer, [tokens], lambda: None).summary()
    ours = measure(Measured(TINY, quantization), PLENTY)
    assert least < ours.divergence < most
    assert ours.positions == theirs.positions == LENGTH - 1
    assert ours.divergence == pytest.approx(theirs.divergence, rel=0.15)
    assert ours.change == pytest.approx(theirs.change, abs=2e-3)
    assert ours.agreement == pytest.approx(theirs.agreement, abs=0.02)


def test_what_is_not_measured_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match="MiB of memory are needed and 1 MiB are free") as short:
        measure(Measured(TINY, "int8"), 1 << 20)
    assert short.value.code == "not_measured"
    monkeypatch.setattr("wherry_runtime.quality.drift.MOST_PARAMETERS", 1_000_000)
    with pytest.raises(ModelError, match="billion weights are more than are measured"):
        measure(Measured(TINY, "int8"), PLENTY)


async def test_what_goes_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nowhere = await drift.measured(Rounded(tmp_path / "nowhere", "int8", 0), PLENTY)
    assert (nowhere.method, nowhere.divergence) == ("int8", None)
    assert "nowhere" in nowhere.error
    unknown = await drift.measured(Rounded(TINY, "int5", 0), PLENTY)
    assert unknown.error == "measuring it failed, with exit status 2"
    monkeypatch.setattr(drift, "LIMIT_S", 0.05)
    assert (await drift.measured(Rounded(TINY, "int8", 0), PLENTY)).error == "measuring it took longer than 0 s"


async def test_the_process_ends_with_whoever_waits_for_it() -> None:
    task = asyncio.create_task(drift.measured(Rounded(TINY, "int8", 0), PLENTY))

    def children() -> list[psutil.Process]:
        return [c for c in psutil.Process().children() if "wherry_runtime.quality.drift" in c.cmdline()]

    await asyncio.to_thread(eventually, lambda: bool(children()), 30)
    found = children()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert not any(child.is_running() for child in found)


def test_a_worker_tells_it_once_it_is_measured() -> None:
    arguments = ["--model-name=tiny", f"--model-uri={TINY}", "--port=0", "--kv-cache-bytes=16777216", "--threads=1"]
    with running(Process("wherry_runtime", [*arguments, "--quantization=int4"], {})) as process:
        eventually(lambda: "quality" in httpx.get(process.url + "/health").json(), 60)
        health = httpx.get(process.url + "/health")
        assert health.status_code == 200
        quality = health.json()["quality"]
        assert quality["method"] == "int4"
        assert 0.0004 < quality["divergence"] < 0.005
        assert quality["tokens"] == LENGTH - 1
    with running(Process("wherry_runtime", arguments, {})) as process:
        eventually(lambda: httpx.get(process.url + "/ready").status_code == 200, 60)
        assert "quality" not in httpx.get(process.url + "/health").json()


@pytest.mark.parametrize("asked", [True, False])
async def test_a_worker_measures_unless_it_is_told_not_to(asked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    looked, loaded = [], asyncio.Event()

    class Loaded:
        """An engine of which nothing is rounded, which is asked for what is by whoever measures."""

        @property
        def rounded(self) -> None:
            looked.append(self)

        async def start(self) -> None:
            loaded.set()

        async def close(self) -> None: ...

    async def serve(*_: object) -> None:
        await loaded.wait()
        for _ in range(100):  # turns of the loop: everything that needs no more has happened then
            await asyncio.sleep(0)

    monkeypatch.setattr(worker, "_serve", serve)
    monkeypatch.setattr(worker, "stop_on_signals", lambda stop: None)
    config = from_args(
        ["--model-name=m", "--model-uri=/m", "--quantization=int4", f"--measure-quality={asked}".lower()]
    )
    assert await worker.run(Loaded(), config, None, None) == 0  # type: ignore[arg-type]
    assert len(looked) == asked
