"""Several processes and one cache: killed, at once, on a full disk."""

import json
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from tests.runtime.sources.conftest import BIG, FILES, WANTED
from tests.runtime.sources.servers import TOKEN, Hub
from tests.runtime.sources.test_fetch import URI, WEIGHTS, assert_no_model, assert_whole, until

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources import lock
from wherry_runtime.sources.fetch import fetch
from wherry_runtime.sources.lock import Lock
from wherry_runtime.sources.progress import Download


@contextmanager
def wherry(*args: str, limit: int | None = None) -> Iterator[subprocess.Popen[str]]:
    """`wherry …`; `limit`: bytes that a file of it may have."""

    def bound() -> None:
        if limit is not None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    command = [sys.executable, "-m", "wherry_cli.main", *args]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=bound) as process:
        try:
            yield process
        finally:
            process.kill()


def pull(cache: Path, **options: int) -> subprocess.CompletedProcess[str]:
    with wherry("pull", URI, f"--model-cache={cache}", **options) as process:
        out, err = process.communicate(timeout=60)
        return subprocess.CompletedProcess([], process.returncode, out, err)


def parts(cache: Path) -> int:
    return sum(path.stat().st_size for path in cache.rglob("model.safetensors.part"))


def test_a_killed_download_is_gone_on_with_by_the_next_process(hub: Hub, cache: Path) -> None:
    hub.content.gate.clear()
    hub.content.gate_after = 262_144
    with wherry("pull", URI, f"--model-cache={cache}") as process:
        until(lambda: parts(cache) == 262_144)
        process.send_signal(signal.SIGKILL)
        process.wait(20)
    assert_no_model(cache)
    hub.content.gate.set()
    until(lambda: len(hub.content.asked) == 1)
    hub.content.served.clear()
    found = pull(cache)
    assert found.returncode == 0, found.stderr
    assert_whole(Path(found.stdout.strip()))
    assert hub.content.asked[-1].headers["range"] == "bytes=262144-"


def test_ctrl_c_ends_a_download_and_the_next_goes_on(hub: Hub, cache: Path) -> None:
    hub.content.gate.clear()
    hub.content.gate_after = 262_144
    with wherry("pull", URI, f"--model-cache={cache}") as process:
        until(lambda: parts(cache) == 262_144)
        process.send_signal(signal.SIGINT)
        hub.content.gate.set()
        out, err = process.communicate(timeout=20)
    assert (process.returncode, out) == (130, "")
    assert "goes on from here" in err
    assert "Traceback" not in err
    assert_no_model(cache)
    assert pull(cache).returncode == 0


def test_processes_that_share_a_cache_download_once(hub: Hub, cache: Path) -> None:
    hub.content.gate.clear()
    with (
        wherry("pull", URI, f"--model-cache={cache}") as one,
        wherry("pull", URI, f"--model-cache={cache}") as two,
        wherry("pull", URI, f"--model-cache={cache}") as three,
    ):
        # All of them know what main is, so one downloads and the others wait.
        until(lambda: len(hub.of("/revision/main")) == 3 and len(hub.content.asked) == 1)
        hub.content.gate.set()
        outs = [process.communicate(timeout=60) for process in (one, two, three)]
    assert [process.returncode for process in (one, two, three)] == [0, 0, 0], outs
    assert len({out for out, _ in outs}) == 1
    assert_whole(Path(outs[0][0].strip()))
    assert hub.content.served[WEIGHTS] == BIG
    assert len(hub.of("config.json")) == 1


def test_who_waits_sees_how_far_the_other_is(hub: Hub, cache: Path) -> None:
    hub.content.gate.clear()
    hub.content.gate_after = 262_144
    waiting = Download()
    with wherry("pull", URI, f"--model-cache={cache}") as process:
        until(lambda: parts(cache) == 262_144)
        thread = threading.Thread(target=fetch, args=(URI, cache, waiting))
        thread.start()
        until(lambda: waiting.snapshot().percent == (262_144 + small()) * 100 // total())
        assert f":{process.pid}" in waiting.snapshot().waiting_for
        # Its holder dies, and the one that waited takes over at once.
        process.send_signal(signal.SIGKILL)
        process.wait(20)
        hub.content.gate.set()
        thread.join(20)
        assert not thread.is_alive()
    [found] = cache.glob("*/snapshots/*")
    assert_whole(found)


def small() -> int:
    return sum(len(FILES[name]) for name in WANTED - {"model.safetensors"})


def total() -> int:
    return sum(len(FILES[name]) for name in WANTED)


def test_a_full_disk_leaves_no_model_and_what_came_is_kept(hub: Hub, cache: Path) -> None:
    found = pull(cache, limit=300_000)
    assert found.returncode == 1
    assert "no room is left" in found.stderr
    assert_no_model(cache)
    assert parts(cache) == 300_000
    hub.content.asked.clear()
    assert pull(cache).returncode == 0
    assert hub.content.asked[0].headers["range"] == "bytes=300000-"


def test_a_lease_of_a_live_node_is_waited_for_and_a_dead_ones_is_not(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a volume whose locks hold on one node only: the lock is free, but another node's lease is there."""
    monkeypatch.setattr(lock, "LEASE_S", 1.0)
    fetch(URI, cache)
    [directory] = cache.iterdir()
    ended, beats = threading.Event(), 0

    def other_node() -> None:
        nonlocal beats
        while not ended.wait(0.05):
            beats += 1
            new = directory / "lease.tmp"
            new.write_text(json.dumps({"node": "other", "who": "pod-b:1", "beat": beats, "done": beats, "total": 1000}))
            new.rename(directory / "lease.json")

    node = threading.Thread(target=other_node)
    node.start()
    until(lambda: beats > 1)
    ours, download, stop = Lock(directory), Download(), threading.Event()
    waiter = threading.Thread(target=ours.acquire, args=(download, stop))
    waiter.start()
    until(lambda: beats > 40)
    assert waiter.is_alive(), "the other node is alive"
    assert download.snapshot().waiting_for == "pod-b:1"
    ended.set()
    node.join()
    began = time.monotonic()
    waiter.join(20)
    assert not waiter.is_alive()
    assert time.monotonic() - began >= 0.5
    ours.beat(download)
    ours.release()
    assert not (directory / "lease.json").exists()


def test_a_cache_that_cannot_be_written_is_one_to_read(hub: Hub, cache: Path) -> None:
    found = fetch(URI, cache)
    [refs] = cache.glob("*/refs")
    shutil.rmtree(refs)
    refs.write_text("nothing can be written here, whoever tries")
    assert fetch(URI, cache) == found


def test_a_cache_is_listed_and_cleared(hub: Hub, cache: Path) -> None:
    fetch(URI, cache)

    def run(*args: str) -> tuple[int, str]:
        with wherry("cache", *args, f"--model-cache={cache}") as process:
            out, err = process.communicate(timeout=60)
            return process.returncode, out + err

    status, text = run("ls")
    assert status == 0
    assert f"{URI}@{hub.commit}" in text
    assert "601 kB" in text
    assert run("rm", "hf://org/nothing")[0] == 1
    assert run("rm", URI) == (0, f"removed {URI}@{hub.commit}, 601 kB\n")
    assert_no_model(cache)
    assert not list(cache.rglob("*.safetensors"))


def test_a_token_is_in_no_output(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.token = "hf_another"
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_DEBUG", "1")
    found = pull(cache)
    assert found.returncode == 1
    assert "the token may not read it" in found.stderr
    assert TOKEN not in found.stdout + found.stderr


def test_fetch_refuses_a_cache_that_is_a_file(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError) as failure:
        fetch(URI, tmp_path / "file")
    assert failure.value.code == "cache_unusable"
