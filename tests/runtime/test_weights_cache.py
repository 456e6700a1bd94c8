"""The cache of packed weights: what it saves, and that nothing about its files can keep a model from loading."""

import json
import logging
import os
import resource
import shutil
import subprocess
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tests.runtime.engines import TINY, ask, running
from tests.runtime.random_models import CASES

from wherry_protocol.engine_config import Quantization
from wherry_runtime.loading import weight_cache
from wherry_runtime.loading.checkpoint import shard_files
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.loading.loader import load_model
from wherry_runtime.models.registry import read_config
from wherry_runtime.quantization.storage import Storage

State = dict[str, torch.Tensor]
Usage = namedtuple("Usage", "total used free")


@pytest.fixture(scope="module")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("pristine")
    next(c for c in CASES if c.name == "llama-biases-sharded").build(directory)
    return directory


@pytest.fixture
def checkpoint(pristine: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(pristine, tmp_path / "model"))


@pytest.fixture(autouse=True)
def _log(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="wherry_runtime.loading")


def state_of(checkpoint: Path, root: Path | None, quantization: Quantization = "int8", group: int = 0) -> State:
    """The state of a freshly loaded model."""
    storage = Storage(torch.float32, torch.device("cpu"), quantization, group, native=True)
    return load_model(checkpoint, read_config(checkpoint), 64, storage, root).state()


def assert_equal(state: State, expected: State) -> None:
    assert list(state) == list(expected)
    for name, tensor in state.items():
        assert tensor.dtype is expected[name].dtype
        assert torch.equal(tensor, expected[name]), name


def only_file(root: Path) -> Path:
    (path,) = root.iterdir()
    return path


@pytest.mark.parametrize(("quantization", "group"), [("none", 0), ("int8", 0), ("int4", 64)], ids=str)
def test_the_second_load_reads_what_the_first_wrote(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, quantization: Quantization, group: int
) -> None:
    root = tmp_path / "a" / "cache"
    expected = state_of(checkpoint, None, quantization, group)
    assert_equal(state_of(checkpoint, root, quantization, group), expected)
    assert "wrote packed weights" in caplog.text
    caplog.clear()
    assert_equal(state_of(checkpoint, root, quantization, group), expected)
    assert "read packed weights" in caplog.text
    assert "wrote" not in caplog.text
    # Any reader of safetensors can look at it.
    assert_equal(dict(sorted(load_file(only_file(root)).items())), dict(sorted(expected.items())))


def test_each_format_has_a_file_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    formats: list[tuple[Quantization, int]] = [("none", 0), ("int8", 0), ("int4", 32), ("int4", 128)]
    for quantization, group in formats:
        state_of(checkpoint, tmp_path / "cache", quantization, group)
    assert len(list((tmp_path / "cache").iterdir())) == 4


def test_a_changed_checkpoint_is_packed_again(checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    state_of(checkpoint, root)
    first = only_file(root)
    shard = shard_files(checkpoint)[0]
    os.utime(shard, ns=(0, shard.stat().st_mtime_ns + 1))
    state_of(checkpoint, root)
    assert {first} < set(root.iterdir())


def test_nothing_is_kept_of_weights_that_are_not_packed(checkpoint: Path, tmp_path: Path) -> None:
    storage = Storage(torch.float32, torch.device("cpu"))
    load_model(checkpoint, read_config(checkpoint), 64, storage, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_damaged_checkpoint_is_named_as_such(checkpoint: Path, tmp_path: Path) -> None:
    shard_files(checkpoint)[0].write_bytes(b"\xff" * 20)
    with pytest.raises(ModelError) as failure:
        state_of(checkpoint, tmp_path / "cache")
    assert failure.value.code == "damaged_shard"


def edit_header(change: Callable[[dict[str, object]], object]) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        content = path.read_bytes()
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        change(header)
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + size :])

    return edit


def flip(position: float) -> Callable[[Path], None]:
    """One bit, at a fraction of the file."""

    def apply(path: Path) -> None:
        content = bytearray(path.read_bytes())
        content[int(position * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return apply


def cut(size: int) -> Callable[[Path], None]:
    return lambda path: os.truncate(path, size if size >= 0 else path.stat().st_size + size)


def replace(content: bytes) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(content)


def zero_a_page(path: Path) -> None:
    """What a lost write leaves."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(4096))


DAMAGE: dict[str, Callable[[Path], object]] = {
    "empty": cut(0),
    "cut in the length": cut(5),
    "cut in the header": cut(300),
    "cut in the data": cut(-1),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0" * 64),
    "garbage": replace(os.urandom(5000)),
    "absurd header": replace((1 << 60).to_bytes(8, "little") + b"{}"),
    "deep header": replace((200_000).to_bytes(8, "little") + b"[" * 200_000),
    "header of no object": replace((2).to_bytes(8, "little") + b"[]"),
    "first tensor": flip(0.5),
    "last byte": flip(1.0),
    "lost write": zero_a_page,
    "another version": edit_header(lambda h: h["__metadata__"].update(layout="0")),  # type: ignore[attr-defined]
    "another model": edit_header(lambda h: h["__metadata__"].update(key="0")),  # type: ignore[attr-defined]
    "no checksums": edit_header(lambda h: h["__metadata__"].pop("checksums")),  # type: ignore[attr-defined]
    "checksums of others": edit_header(lambda h: h["__metadata__"].update(checksums="{}")),  # type: ignore[attr-defined]
    "no metadata": edit_header(lambda h: h.pop("__metadata__")),
    "offsets": edit_header(lambda h: h["model.norm.weight"].update(data_offsets=[0, 256])),  # type: ignore[attr-defined]
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_file_that_is_not_right_is_written_again(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[Path], object]
) -> None:
    root = tmp_path / "cache"
    expected = state_of(checkpoint, root)
    path = only_file(root)
    whole = path.read_bytes()
    damage(path)
    caplog.clear()
    assert_equal(state_of(checkpoint, root), expected)
    assert f"{path} cannot be used and is written again" in caplog.text
    assert path.read_bytes() == whole
    assert only_file(root) == path


def test_a_directory_in_its_place(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "cache"
    expected = state_of(checkpoint, root)
    path = only_file(root)
    path.unlink()
    path.mkdir()
    assert_equal(state_of(checkpoint, root), expected)
    assert "were not kept" in caplog.text
    assert only_file(root) == path


def test_a_cache_that_cannot_be_made(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "file").write_text("")
    assert_equal(state_of(checkpoint, tmp_path / "file" / "cache"), state_of(checkpoint, None))
    assert "were not kept" in caplog.text


def test_a_link_laid_out_for_the_writer_is_not_followed(checkpoint: Path, tmp_path: Path) -> None:
    root, victim = tmp_path / "cache", tmp_path / "victim"
    state_of(checkpoint, root)
    path = only_file(root)
    path.unlink()
    victim.write_text("precious")
    path.with_suffix(".partial").symlink_to(victim)
    state_of(checkpoint, root)
    assert victim.read_text() == "precious"


@contextmanager
def small_disk(directory: Path, size: int) -> Iterator[None]:
    """A file system of `size` bytes at `directory`."""
    directory.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", directory], capture_output=True)
    if made.returncode:
        pytest.skip("file systems cannot be mounted here")
    try:
        yield
    finally:
        subprocess.run(["umount", directory], check=True)


@pytest.mark.parametrize("seen", [True, False], ids=["seen before", "met while writing"])
def test_a_full_disk(
    checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, seen: bool
) -> None:
    expected = state_of(checkpoint, None)
    if not seen:  # as when others write at the same time
        monkeypatch.setattr(weight_cache.shutil, "disk_usage", lambda _: Usage(1 << 40, 0, 1 << 40))
    with small_disk(tmp_path / "cache", 65536):
        assert_equal(state_of(checkpoint, tmp_path / "cache"), expected)
        assert list((tmp_path / "cache").iterdir()) == []
    assert ("are free" if seen else "No space left on device") in caplog.text


def test_a_limit_on_file_sizes(checkpoint: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = state_of(checkpoint, None)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        assert_equal(state_of(checkpoint, tmp_path / "cache"), expected)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in caplog.text
    assert list((tmp_path / "cache").iterdir()) == []


def test_what_a_killed_writer_left_is_taken_over(checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    expected = state_of(checkpoint, root)
    path = only_file(root)
    whole = path.read_bytes()
    path.rename(path.with_suffix(".partial"))
    with path.with_suffix(".partial").open("ab") as file:
        file.write(b"more than the file will have")
    assert_equal(state_of(checkpoint, root), expected)
    assert path.read_bytes() == whole
    assert only_file(root) == path


def test_many_loaders_at_once(checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "cache"
    expected = state_of(checkpoint, None)
    start = threading.Barrier(6)
    states: list[State] = []

    def run() -> None:
        start.wait(30)
        states.append(state_of(checkpoint, root))

    threads = [threading.Thread(target=run) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(states) == 6
    for state in states:
        assert_equal(state, expected)
    assert only_file(root).suffix == ".safetensors"


async def test_answers_are_the_same_from_the_cache(tmp_path: Path) -> None:
    answers = []
    for _ in range(2):
        async with running(TINY, quantization="int4", weight_cache=str(tmp_path), block_size=16) as engine:
            answers.append((await ask(engine, "The kernel", temperature=0, max_tokens=12)).ids)
    assert answers[0] == answers[1]
    assert only_file(tmp_path).suffix == ".safetensors"
