"""Headers of both formats: what is read of good files, and that broken ones are refused with the reason."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from safetensors import SafetensorError, deserialize
from tests.runtime.formats.files import small_gguf, small_safetensors

from wherry_runtime.formats.detect import gguf_files, kind_of
from wherry_runtime.formats.gguf import reader as gguf_reader
from wherry_runtime.formats.gguf.reader import GGUFFile
from wherry_runtime.formats.gguf.types import BY_NAME
from wherry_runtime.formats.gguf.writer import encoded_header, planned
from wherry_runtime.formats.safetensors import reader as safetensors_reader
from wherry_runtime.formats.safetensors.reader import SafetensorsFile
from wherry_runtime.loading.errors import ModelError


@pytest.mark.parametrize("version", [2, 3])
def test_a_file_of_gguf_py(tmp_path: Path, version: int) -> None:
    path = tmp_path / "small"
    path.write_bytes(small_gguf(tmp_path / "seed.gguf", version))
    file = GGUFFile.open(path)
    assert (file.header.version, file.header.alignment) == (version, 32)
    shown = {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in file.header.metadata.items()}
    assert shown == {
        "general.architecture": "llama",
        "one.add_uint8": 255,
        "one.add_int8": -1,
        "one.add_uint16": 65535,
        "one.add_int16": -2,
        "one.add_uint32": 1 << 31,
        "one.add_int32": -3,
        "one.add_float32": 0.5,
        "one.add_bool": True,
        "one.add_string": "snow ☃ 雪",
        "one.add_uint64": 1 << 63,
        "one.add_int64": -(1 << 40),
        "one.add_float64": 1e300,
        "many.strings": ["", "a", "☃"],
        "many.numbers": [1, 2, 3],
        "many.floats": [0.25, -1.5],
        "many.bools": [True, False],
    }
    theirs = {t.name: t for t in gguf.GGUFReader(path).tensors}
    assert file.header.tensors.keys() == theirs.keys()
    for name, info in file.header.tensors.items():
        assert (info.type.id, info.offset, info.nbytes) == (
            int(theirs[name].tensor_type),
            theirs[name].data_offset,
            theirs[name].n_bytes,
        )
        assert list(info.shape[::-1]) == theirs[name].shape.tolist()
        assert file.raw(info).tobytes() == theirs[name].data.tobytes()


def test_what_is_written_reads_in_gguf_py(tmp_path: Path) -> None:
    metadata: dict[str, Any] = {
        "general.architecture": "llama",
        "general.alignment": 64,
        "whole": 7,
        "large": 1 << 40,
        "negative": -5,
        "share": 0.5,
        "flag": True,
        "text": "☃",
        "texts": ["a", "", "雪"],
        "numbers": np.array([1, -2], np.int32),
        "floats": np.array([0.5], np.float32),
    }
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    infos = planned([("first", (3, 4), BY_NAME["F32"]), ("second", (3, 4), BY_NAME["F32"])], 64)
    path = tmp_path / "ours.gguf"
    path.write_bytes(
        encoded_header(metadata, infos) + values.tobytes() + bytes(16) + (2 * values).tobytes() + bytes(16)
    )
    theirs = gguf.GGUFReader(path)
    for key, value in metadata.items():
        found = theirs.fields[key].contents()
        assert found == (value.tolist() if isinstance(value, np.ndarray) else value)
    assert [t.data.tolist() for t in theirs.tensors] == [values.tolist(), (2 * values).tolist()]
    assert GGUFFile.open(path).header.metadata["texts"] == ["a", "", "雪"]


def header(*parts: bytes, tensors: int = 0, values: int = 0, version: int = 3) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + b"".join(parts)


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def tensor(name: bytes, dims: list[int], kind: int, offset: int) -> bytes:
    return text(name) + struct.pack(f"<I{len(dims)}QIQ", len(dims), *dims, kind, offset)


HUGE = (1 << 64) - 1
BAD_GGUF: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "another format": (b"PK\x03\x04" + bytes(40), "does not begin with GGUF"),
    "version 1": (header(version=1), "version 1"),
    "big endian": (header(version=3 << 24), "big-endian"),
    "ends in the counts": (b"GGUF\x03\0\0\0\1", "takes 8 bytes"),
    "tensors beyond the file": (header(tensors=HUGE), "cannot be in"),
    "values beyond the file": (header(values=1 << 40), "cannot be in"),
    "key beyond the file": (header(struct.pack("<Q", 1 << 50), bytes(64), values=1), "at most 65535"),
    "key is not UTF-8": (header(text(b"\xff"), bytes(64), values=1), "not UTF-8"),
    "string beyond the file": (header(text(b"k"), struct.pack("<IQ", 8, HUGE), bytes(64), values=1), "are left"),
    "unknown value type": (header(text(b"k"), struct.pack("<I", 13), bytes(64), values=1), "value type 13"),
    "a bool of 2": (header(text(b"k"), struct.pack("<IB", 7, 2), bytes(64), values=1), "bool of 2"),
    "array beyond the file": (
        header(text(b"k"), struct.pack("<IIQ", 9, 10, 1 << 61), bytes(64), values=1),
        "cannot be in",
    ),
    "strings beyond the file": (
        header(text(b"k"), struct.pack("<IIQ", 9, 8, 1 << 40), bytes(64), values=1),
        "cannot be in",
    ),
    "array of arrays": (header(text(b"k"), struct.pack("<IIQ", 9, 9, 1), bytes(64), values=1), "arrays of arrays"),
    "bools of 2": (header(text(b"k"), struct.pack("<IIQ", 9, 7, 1), b"\2", bytes(64), values=1), "neither 0 nor 1"),
    "a key twice": (header(*[text(b"k") + struct.pack("<IB", 7, 1)] * 2, bytes(64), values=2), "there twice"),
    "alignment of 3": (
        header(text(b"general.alignment"), struct.pack("<II", 4, 3), bytes(64), values=1),
        "power of two",
    ),
    "alignment of 0": (
        header(text(b"general.alignment"), struct.pack("<II", 4, 0), bytes(64), values=1),
        "power of two",
    ),
    "alignment is text": (
        header(text(b"general.alignment"), struct.pack("<I", 8), text(b"32"), values=1),
        "power of two",
    ),
    "five dimensions": (header(tensor(b"t", [1] * 5, 0, 0), bytes(64), tensors=1), "5 dimensions"),
    "type 4": (header(tensor(b"t", [32], 4, 0), bytes(64), tensors=1), "no longer read"),
    "type 99": (header(tensor(b"t", [32], 99, 0), bytes(64), tensors=1), "type 99"),
    "no elements": (header(tensor(b"t", [0], 0, 0), bytes(64), tensors=1), "whole blocks"),
    "half a block": (header(tensor(b"t", [16], 8, 0), bytes(64), tensors=1), "whole blocks"),
    "overflowing shape": (header(tensor(b"t", [1 << 62] * 4, 0, 0), bytes(64), tensors=1), "where they can be"),
    "offset out of line": (header(tensor(b"t", [1], 0, 4), bytes(128), tensors=1), "where they can be"),
    "offset beyond the file": (header(tensor(b"t", [1], 0, 1 << 40), bytes(64), tensors=1), "where they can be"),
    "truncated data": (header(tensor(b"t", [32], 0, 0), bytes(64), tensors=1), "truncated"),
    "a tensor twice": (header(tensor(b"t", [8], 0, 0), tensor(b"t", [8], 0, 32), bytes(128), tensors=2), "there twice"),
    "overlapping tensors": (
        header(tensor(b"t", [16], 0, 0), tensor(b"u", [8], 0, 32), bytes(256), tensors=2),
        "overlaps",
    ),
}


@pytest.mark.parametrize("name", BAD_GGUF)
def test_broken_gguf(tmp_path: Path, name: str) -> None:
    data, message = BAD_GGUF[name]
    path = tmp_path / "broken.gguf"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message) as failure:
        GGUFFile.open(path)
    assert failure.value.code == "bad_gguf"
    assert str(path) in failure.value.message


def entries(**changes: Any) -> dict[str, Any]:
    return {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}


def safetensors(content: Any, data: int = 8) -> bytes:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(raw).to_bytes(8, "little") + raw + bytes(data)


TWICE = b'{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}'
BAD_SAFETENSORS: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "empty"),
    "seven bytes": (b"1234567", "7 bytes"),
    "header beyond the file": (struct.pack("<Q", 1 << 60) + b"{}", "more than there are"),
    "no object": (safetensors([]), "not a JSON object"),
    "not JSON": (safetensors(b"{]"), "does not read"),
    "deep": (safetensors(b'{"a":' * 100_000), "does not read"),
    "not UTF-8": (safetensors(b'{"\xff":1}'), "does not read"),
    "a name twice": (safetensors(TWICE), "there twice"),
    "metadata that is no text": (safetensors({"__metadata__": {"a": 1}}), "does not read"),
    "an unknown field": (safetensors(entries(extra=1)), "does not read"),
    "a shape of text": (safetensors(entries(shape=["2"])), "does not read"),
    "a shape of true": (safetensors(entries(shape=[True, 2])), "does not read"),
    "a negative shape": (safetensors(entries(shape=[-2])), "not possible"),
    "33 dimensions": (safetensors(entries(shape=[1] * 32 + [2])), "not possible"),
    "an unknown dtype": (safetensors(entries(dtype="Q4")), "'Q4' is not known"),
    "half a byte": (safetensors(entries(dtype="F4", shape=[1])), "whole bytes"),
    "a shape that does not fit": (safetensors(entries(shape=[3])), "do not fit"),
    "an overflowing shape": (safetensors(entries(shape=[1 << 62, 1 << 62])), "do not fit"),
    "offsets in reverse": (safetensors(entries(data_offsets=[8, 0])), "do not fit"),
    "a gap": (safetensors(entries(data_offsets=[4, 12]), 12), "gap"),
    "an overlap": (safetensors({**entries(), "b": entries(data_offsets=[4, 12])["a"]}, 12), "overlap"),
    "truncated": (safetensors(entries(), 7), "truncated"),
    "more data": (safetensors(entries(), 9), "truncated"),
}


@pytest.mark.parametrize("name", BAD_SAFETENSORS)
def test_broken_safetensors(tmp_path: Path, name: str) -> None:
    data, message = BAD_SAFETENSORS[name]
    path = tmp_path / "broken.safetensors"
    path.write_bytes(data)
    with pytest.raises(ModelError, match=message) as failure:
        SafetensorsFile.open(path)
    assert failure.value.code == "bad_safetensors"


def test_a_file_of_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "small"
    path.write_bytes(small_safetensors())
    file = SafetensorsFile.open(path)
    assert file.header.metadata == {"format": "np", "note": "☃"}
    theirs = dict(deserialize(path.read_bytes()))
    assert file.header.tensors.keys() == theirs.keys()
    for name, info in file.header.tensors.items():
        assert (info.dtype, list(info.shape)) == (theirs[name]["dtype"], theirs[name]["shape"])
        assert file.raw(info).tobytes() == bytes(theirs[name]["data"])


@pytest.mark.parametrize("kind", ["gguf", "safetensors"])
def test_no_truncation_passes(tmp_path: Path, kind: str) -> None:
    data = small_gguf(tmp_path / "seed.gguf") if kind == "gguf" else small_safetensors()
    parse: Callable[..., Any] = (gguf_reader if kind == "gguf" else safetensors_reader).parse_header
    used = max(t.offset + t.nbytes for t in parse(data, len(data)).tensors.values())
    for size in range(used):
        with pytest.raises(ModelError):
            parse(data[:size], size)


def test_no_flipped_bit_is_worse_than_refused(tmp_path: Path) -> None:
    """Of headers; what is in the data only a checksum can tell."""
    for data, module in ((small_gguf(tmp_path / "s"), gguf_reader), (small_safetensors(), safetensors_reader)):
        start = module.parse_header(data, len(data)).data_start
        for bit in range(8 * start):
            flipped = bytearray(data)
            flipped[bit // 8] ^= 1 << bit % 8
            try:
                found = module.parse_header(bytes(flipped), len(data))
            except ModelError:
                continue
            assert all(t.offset + t.nbytes <= len(data) for t in found.tensors.values())
            if module is safetensors_reader:
                deserialize(bytes(flipped))  # what we accept, they accept


def test_what_safetensors_refuses_is_refused(tmp_path: Path) -> None:
    for name, (data, _) in BAD_SAFETENSORS.items():
        if name in ("an unknown field", "a name twice", "33 dimensions"):  # ours is stricter
            continue
        with pytest.raises((SafetensorError, ValueError)):
            deserialize(data)


def test_formats_are_told_by_content(tmp_path: Path) -> None:
    contents = {
        "gguf": small_gguf(tmp_path / "seed.gguf"),
        "safetensors": small_safetensors(),
        "torch": b"PK\x03\x04" + bytes(20),
        "unknown": b"hello",
    }
    for kind, data in contents.items():
        path = tmp_path / "model.bin"
        path.write_bytes(data)
        assert kind_of(path) == kind
    path.write_bytes(b"\x80\x02}q\x00.")
    assert kind_of(path) == "torch"


def test_parts_of_a_split_model(tmp_path: Path) -> None:
    data = small_gguf(tmp_path / "seed")
    parts = [tmp_path / f"m-{i:05d}-of-00003.gguf" for i in (1, 2, 3)]
    for part in parts:
        part.write_bytes(data)
    assert gguf_files(parts[1]) == parts
    assert gguf_files(tmp_path) == parts
    parts[2].unlink()
    with pytest.raises(ModelError, match="00003-of-00003"):
        gguf_files(parts[0])
    for part in parts[1:2]:
        part.unlink()
    (tmp_path / "other.gguf").write_bytes(data)
    parts[0].rename(tmp_path / "one.gguf")
    with pytest.raises(ModelError, match=r"name one: one\.gguf, other\.gguf"):
        gguf_files(tmp_path)
