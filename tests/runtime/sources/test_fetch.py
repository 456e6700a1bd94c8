"""From a hub that misbehaves to a whole model, or to none and a reason."""

import contextlib
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.runtime.sources.conftest import BIG, FILES, WANTED
from tests.runtime.sources.servers import (
    COMMIT,
    TOKEN,
    Answer,
    Fault,
    Hub,
    cut,
    sha256,
    status,
    too_many_bytes,
    wrong_bytes,
)

from wherry_runtime.loading.errors import ModelError
from wherry_runtime.sources import transfer
from wherry_runtime.sources.fetch import fetch
from wherry_runtime.sources.progress import Download
from wherry_runtime.sources.store import RECORD, cached, check_names
from wherry_runtime.sources.types import Listing, RemoteFile, Request, TransferError

URI = "hf://org/model"
WEIGHTS = f"/blob/{sha256(FILES['model.safetensors'])}"
CONFIG = f"/org/model/resolve/{COMMIT}/config.json"
INFO = "/api/models/org/model/revision/main"


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()} - {RECORD}


def assert_whole(directory: Path) -> None:
    assert names(directory) == WANTED
    for name in WANTED:
        assert (directory / name).read_bytes() == FILES[name], name


def assert_no_model(cache: Path) -> None:
    assert list(cached(cache)) == []
    assert not any(path.name == RECORD for path in cache.rglob("*"))


def test_a_model_of_the_hub_is_its_weights_once_and_what_describes_them(hub: Hub, cache: Path) -> None:
    progress = Download()
    found = fetch(URI, cache, progress)
    assert_whole(found)
    assert found.name == COMMIT
    record = json.loads((found / RECORD).read_text())
    assert (record["source"], record["revision"]) == (URI, COMMIT)
    assert {file["path"] for file in record["files"]} == WANTED
    at = progress.snapshot()
    assert at.done == at.total == sum(len(FILES[name]) for name in WANTED)
    assert at.percent == 100
    assert not progress.active


def test_the_second_start_asks_what_main_is_and_downloads_nothing(hub: Hub, cache: Path) -> None:
    first = fetch(URI, cache)
    hub.asked.clear()
    assert fetch(URI, cache) == first
    assert [asked.path for asked in hub.asked] == [INFO]
    hub.asked.clear()
    assert fetch(f"{URI}@{COMMIT}", cache) == first
    assert hub.asked == []  # a commit is what it is


def test_a_new_commit_is_a_new_model(hub: Hub, cache: Path) -> None:
    first = fetch(URI, cache)
    hub.commit, hub.files["config.json"] = "f" * 40, b'{"model_type": "qwen2"}'
    second = fetch(URI, cache)
    assert (second / "config.json").read_bytes() == b'{"model_type": "qwen2"}'
    assert (first / "config.json").read_bytes() == FILES["config.json"]


FAULTS: list[tuple[str, str, list[Fault]]] = [
    ("connection cut in the middle", WEIGHTS, [cut(200_000)]),
    ("cut again and again", WEIGHTS, [cut(70_000)] * 12),
    ("cut before the first byte", WEIGHTS, [cut(0)] * 3),
    ("unavailable", WEIGHTS, [status(503)] * 3),
    ("rate limited", CONFIG, [status(429, retry_after="0")] * 3),
    ("rate limited while resolving", INFO, [status(429, retry_after="0"), status(502)]),
    ("a range that is ignored", WEIGHTS, [cut(200_000), lambda a: Answer(200, a.body, {"x": "y"})]),
    ("wrong bytes before a cut", WEIGHTS, [lambda a: cut(200_000)(wrong_bytes(a)), cut(100_000)]),
]


@pytest.mark.parametrize(("path", "faults"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_what_passes_is_tried_again(hub: Hub, cache: Path, path: str, faults: list[Fault]) -> None:
    (hub.content if path == WEIGHTS else hub).faults[path] = list(faults)
    assert_whole(fetch(URI, cache))


def test_a_cut_download_goes_on_where_it_was_cut(hub: Hub, cache: Path) -> None:
    hub.content.faults[WEIGHTS] = [cut(200_000), cut(300_000)]
    assert_whole(fetch(URI, cache))
    assert hub.content.served[WEIGHTS] == BIG
    assert [asked.headers.get("range") for asked in hub.content.of(WEIGHTS)] == [None, "bytes=200000-", "bytes=500000-"]


def test_retry_after_is_waited_for(hub: Hub, cache: Path) -> None:
    hub.faults[CONFIG] = [status(429, retry_after="1")]
    began = time.monotonic()
    fetch(URI, cache)
    assert time.monotonic() - began >= 1


HOPELESS: list[tuple[str, str, list[Fault], str]] = [
    ("wrong bytes of the right length", WEIGHTS, [wrong_bytes] * 9, "corrupt_download"),
    ("wrong bytes of a small file", CONFIG, [wrong_bytes] * 9, "corrupt_download"),
    ("more bytes than there are", WEIGHTS, [too_many_bytes] * 9, "corrupt_download"),
    ("gone", WEIGHTS, [status(404)], "model_not_found"),
    ("never more than nothing", WEIGHTS, [cut(0)] * 99, "source_unreachable"),
    ("rate limited for good", CONFIG, [status(429, retry_after="0")] * 99, "rate_limited"),
    ("redirect in circles", CONFIG, [status(302, location=CONFIG)] * 99, "redirect_refused"),
    ("redirect to a file", CONFIG, [status(302, location="file:///etc/passwd")], "redirect_refused"),
]


@pytest.mark.parametrize(("path", "faults", "code"), [h[1:] for h in HOPELESS], ids=[h[0] for h in HOPELESS])
def test_what_does_not_pass_leaves_no_model(hub: Hub, cache: Path, path: str, faults: list[Fault], code: str) -> None:
    (hub.content if path == WEIGHTS else hub).faults[path] = list(faults)
    with pytest.raises(ModelError) as failure:
        fetch(URI, cache)
    assert failure.value.code == code
    assert_no_model(cache)
    hub.faults.clear()
    hub.content.faults.clear()
    assert_whole(fetch(URI, cache))


def test_a_damaged_part_is_thrown_away_and_downloaded_again(hub: Hub, cache: Path) -> None:
    hub.content.faults[WEIGHTS] = [cut(200_000), *([status(404)] * 1)]
    with pytest.raises(ModelError):
        fetch(URI, cache)
    [part] = cache.rglob("model.safetensors.part")
    with part.open("r+b") as out:
        out.seek(1000)
        out.write(b"bit rot")
    assert_whole(fetch(URI, cache))


@pytest.mark.parametrize("damage", ["truncate", "remove"])
def test_a_model_that_somebody_damaged_is_made_whole_again(hub: Hub, cache: Path, damage: str) -> None:
    found = fetch(URI, cache)
    os.truncate(found / "tokenizer.json", 5) if damage == "truncate" else (found / "tokenizer.json").unlink()
    hub.content.served.clear()
    assert_whole(fetch(URI, cache))
    assert hub.content.served[WEIGHTS] == 0  # the rest is as it was


@pytest.mark.parametrize(
    ("gated", "token", "message"),
    [
        (False, None, "without a token"),
        (False, "hf_wrong", "the token may not read it"),
        (True, "hf_wrong", "is gated"),
    ],
)
def test_what_may_not_be_read(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, gated: bool, token: str | None, message: str
) -> None:
    hub.token, hub.gated = TOKEN, gated
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ModelError, match=message) as failure:
        fetch(URI, cache)
    assert failure.value.code == "access_denied"


def test_a_token_goes_to_the_hub_only_and_is_told_nowhere(
    hub: Hub, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "HF_TOKEN").write_text(TOKEN + "\n")
    monkeypatch.setenv("WHERRY_MODEL_SECRET", str(tmp_path / "secret"))
    hub.token = TOKEN
    hub.content.faults[WEIGHTS] = [cut(1000), status(503), *([status(404)] * 1)]
    with caplog.at_level(logging.INFO), pytest.raises(ModelError) as failure:
        fetch(URI, cache)
    with caplog.at_level(logging.INFO):
        assert_whole(fetch(URI, cache))
    assert hub.content.asked  # which refuses whoever shows a token
    assert all("authorization" not in asked.headers for asked in hub.content.asked)
    told = failure.value.message + caplog.text + "".join(p.read_text() for p in cache.rglob("*.json"))
    assert "404" in told
    for secret in (TOKEN, "signed-by-the-hub", "Signature"):
        assert secret not in told


@pytest.mark.parametrize("how", ["gone", "HF_HUB_OFFLINE", "unavailable"])
def test_offline_what_main_was_last_is_used_and_said(
    hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, how: str
) -> None:
    first = fetch(URI, cache)
    if how == "gone":
        monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    elif how == "unavailable":
        hub.faults[INFO] = [status(503)] * 99
        hub.faults[INFO.replace("main", "v1")] = [status(503)] * 99
    else:
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with caplog.at_level(logging.WARNING):
        assert fetch(URI, cache) == first
    assert f"going on with revision {COMMIT}" in caplog.text
    with pytest.raises(ModelError) as failure:
        fetch(f"{URI}@v1", cache)
    assert failure.value.code == "source_unreachable"


def test_a_revision_that_is_not_there(hub: Hub, cache: Path) -> None:
    with pytest.raises(ModelError, match="no revision nope"):
        fetch(f"{URI}@nope", cache)


BAD = [
    "../config.json",
    "/etc/config.json",
    "a/../../b",
    "a\\..\\b",
    "a//b",
    ".",
    "",
    "a/./b",
    RECORD,
    "a\nb",
    "x" * 300,
]


@pytest.mark.parametrize("name", BAD)
def test_names_that_lead_elsewhere_are_refused(name: str) -> None:
    request = Request("http://127.0.0.1:9/")
    good = RemoteFile("config.json", 1, None, lambda: request)
    check_names(Listing("r", (good,)))
    with pytest.raises(TransferError) as failure:
        check_names(Listing("r", (good, RemoteFile(name, 1, None, lambda: request))))
    assert failure.value.code == "unsafe_name"


def test_a_file_that_is_there_twice_is_refused() -> None:
    file = RemoteFile("config.json", 1, None, lambda: Request("http://127.0.0.1:9/"))
    with pytest.raises(TransferError, match="twice"):
        check_names(Listing("r", (file, file)))


def test_a_repository_with_a_name_that_climbs_puts_nothing_outside(hub: Hub, cache: Path, tmp_path: Path) -> None:
    hub.files["../evil_Pooling/config.json"] = hub.files["../evil.json"] = b"{}"
    with contextlib.suppress(ModelError):
        fetch(URI, cache)
    assert not list(tmp_path.rglob("evil*"))


GGUF = {"a-Q4_K_M.gguf": b"GGUF1", "a-Q8_0.gguf": b"GGUF2", "README.md": b"x"}
SHARDS = {f"a-{i:05}-of-00003.gguf": b"GGUF%d" % i for i in (1, 2, 3)}


def test_a_gguf_is_named_in_the_uri_and_is_a_file(hub: Hub, cache: Path) -> None:
    hub.files = dict(GGUF)
    hub.large = set(GGUF)
    with pytest.raises(ModelError, match=r"several GGUF files.*a-Q4_K_M\.gguf, a-Q8_0\.gguf"):
        fetch(URI, cache)
    four, eight = fetch(f"{URI}@main/a-Q4_K_M.gguf", cache), fetch(f"{URI}/a-Q8_0.gguf", cache)
    assert (four.read_bytes(), eight.read_bytes()) == (b"GGUF1", b"GGUF2")
    assert names(four.parent) == {"a-Q4_K_M.gguf"}


def test_a_gguf_in_shards_is_all_of_them(hub: Hub, cache: Path) -> None:
    hub.files = dict(SHARDS)
    hub.large = set(SHARDS)
    found = fetch(URI, cache)
    assert found.name == "a-00001-of-00003.gguf"
    assert names(found.parent) == set(SHARDS)


def test_a_full_disk_is_told_before_the_download(hub: Hub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Full:
        f_bavail, f_frsize = 10, 4096

    monkeypatch.setattr(transfer.os, "statvfs", lambda _: Full)
    with pytest.raises(ModelError, match="needs 601 kB more and 41 kB are free") as failure:
        fetch(URI, cache)
    assert failure.value.code == "disk_full"
    assert hub.content.asked == []


def test_a_download_can_be_stopped_and_goes_on_later(hub: Hub, cache: Path) -> None:
    hub.content.gate.clear()
    hub.content.gate_after = 131_072
    stop, failures = threading.Event(), []
    progress = Download()

    def run() -> None:
        try:
            fetch(URI, cache, progress, stop)
        except ModelError as error:
            failures.append(error.code)

    thread = threading.Thread(target=run)
    thread.start()
    until(lambda: progress.snapshot().done > 100_000)
    stop.set()
    hub.content.gate.set()
    thread.join(20)
    assert failures == ["stopped"]
    assert_no_model(cache)
    assert_whole(fetch(URI, cache))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        time.sleep(0.005)
