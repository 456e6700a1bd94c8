"""Models converted and converted back, loaded from GGUF, interrupted, damaged: real files, real processes."""

import asyncio
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.runtime.engines import TINY, ask, running
from tests.runtime.random_models import CASES
from typer.testing import CliRunner

from wherry_cli.main import app
from wherry_protocol.worker import ChatMessage, Prompt
from wherry_runtime.formats.conversion.source import Source, SourceTensor, open_source
from wherry_runtime.formats.conversion.to_gguf import to_gguf
from wherry_runtime.formats.gguf.changes import rows_from_neighbours, rows_to_neighbours
from wherry_runtime.formats.gguf.model import GGUFModel
from wherry_runtime.formats.gguf.reader import GGUFFile
from wherry_runtime.formats.gguf.rope import inverse_frequencies, llama3_scaling
from wherry_runtime.formats.gguf.types import type_named
from wherry_runtime.loading.checkpoint import iterate_tensors
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.models.registry import read_config

# Ids, text and messages: tokenizer and chat template are the file's, too.
PROMPTS: list[Any] = [
    [5, 17, 300, 41],
    "The kernel's scheduler",
    Prompt(messages=[ChatMessage(role="user", content="What is a page fault?")]),
]


def wherry(*args: object) -> Any:
    return CliRunner().invoke(app, [str(a) for a in args])


def done(*args: object) -> str:
    result = wherry(*args)
    assert result.exit_code == 0, result.output
    return str(result.output)


def same_tensors(a: Path, b: Path) -> bool:
    ours, theirs = load_file(a / "model.safetensors"), dict(iterate_tensors(b))
    return ours.keys() == theirs.keys() and all(
        ours[k].dtype == theirs[k].dtype and torch.equal(ours[k].view(torch.uint8), theirs[k].view(torch.uint8))
        for k in ours
    )


async def greedy(model: Path) -> list[list[int]]:
    async with running(model, backend="pytorch", threads=1) as engine:
        return [(await ask(engine, p, max_tokens=12, temperature=0.0, ignore_eos=True)).ids for p in PROMPTS]


@pytest.fixture(scope="module")
def tiny_gguf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    done("convert", TINY, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_round_trips_are_exact(tmp_path: Path, dtype: torch.dtype) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    tensors = {k: t.to(dtype) for k, t in load_file(TINY / "model.safetensors").items()}
    tensors["model.norm.weight"] += 0.001  # of the model's own precision
    save_file(tensors, source / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"dtype": str(dtype).removeprefix("torch.")}
    (source / "config.json").write_text(json.dumps(config))
    done("convert", source, tmp_path / "there.gguf")
    done("convert", tmp_path / "there.gguf", tmp_path / "back")
    assert same_tensors(tmp_path / "back", source)
    assert read_config(tmp_path / "back") == read_config(tmp_path / "there.gguf") == read_config(source)
    for name in ("tokenizer.json",):
        assert json.loads((tmp_path / "back" / name).read_text()) == json.loads((TINY / name).read_text())
    settings = json.loads((tmp_path / "back" / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == json.loads((TINY / "tokenizer_config.json").read_text())["chat_template"]


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_every_family_that_gguf_has(tmp_path: Path, case: Any) -> None:
    """Through GGUF and back; and the engine answers the same from the GGUF file."""
    source = tmp_path / "source"
    source.mkdir()
    case.build(source)
    if read_config(source).architecture not in (
        "LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM",
    ):  # fmt: skip
        with pytest.raises(ModelError, match="is not converted"):
            to_gguf(open_source(source), tmp_path / "m.gguf", None, lambda _: None)
        return
    config = json.loads((source / "config.json").read_text())
    if config.get("max_window_layers") and config.get("use_sliding_window"):
        with pytest.raises(ModelError, match="some of the layers"):
            to_gguf(open_source(source), tmp_path / "m.gguf", None, lambda _: None)
        return
    to_gguf(open_source(source), tmp_path / "m.gguf", None, lambda _: None)
    ours, theirs = dict(iterate_tensors(tmp_path / "m.gguf")), dict(iterate_tensors(source))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].float(), theirs[k].float()) for k in ours)
    read, wanted = read_config(tmp_path / "m.gguf"), read_config(source)
    ignored = {"family", "architecture", "eos_token_ids", "bos_token_id", "windows"}
    for field in wanted.__struct_fields__:
        if field not in ignored:
            assert getattr(read, field) == getattr(wanted, field), field
    assert set(read.windows) - {None} == set(wanted.windows) - {None}


def test_a_gguf_file_answers_as_its_checkpoint(tiny_gguf: Path) -> None:
    assert asyncio.run(greedy(tiny_gguf)) == asyncio.run(greedy(TINY))


@pytest.mark.parametrize("name", ["Q8_0", "Q4_K"])
def test_a_quantized_file_answers_as_what_it_becomes(tmp_path: Path, name: str) -> None:
    done("convert", TINY, tmp_path / "q.gguf", "--type", name)
    done("convert", tmp_path / "q.gguf", tmp_path / "float", "--type", "F32")
    assert asyncio.run(greedy(tmp_path / "q.gguf")) == asyncio.run(greedy(tmp_path / "float"))
    names = {info.type.name for info in GGUFModel.open([tmp_path / "q.gguf"]).infos.values()}
    assert names == ({"F32", "Q8_0"} if name == "Q8_0" else {"F32", "Q4_K", "Q6_K", "Q8_0"})


def test_gguf_py_reads_the_same_weights(tiny_gguf: Path) -> None:
    theirs = {t.name: t for t in gguf.GGUFReader(tiny_gguf).tensors}
    ours = load_file(TINY / "model.safetensors")
    q = gguf.quants.dequantize(theirs["blk.0.attn_q.weight"].data, gguf.GGMLQuantizationType.BF16)
    # As convert_hf_to_gguf does it: heads of (2, n/2) rows become (n/2, 2).
    expected = ours["model.layers.0.self_attn.q_proj.weight"].float().reshape(8, 2, 16, 256).swapaxes(1, 2)
    assert np.array_equal(q, expected.reshape(256, 256).numpy())
    up = gguf.quants.dequantize(theirs["blk.3.ffn_up.weight"].data, gguf.GGMLQuantizationType.BF16)
    assert np.array_equal(up, ours["model.layers.3.mlp.up_proj.weight"].float().numpy())


def test_rows_change_places_and_back() -> None:
    there, back = rows_to_neighbours(24, 3), rows_from_neighbours(24, 3)
    assert there[:8].tolist() == [0, 4, 1, 5, 2, 6, 3, 7]
    assert there[back].tolist() == list(range(24))


def test_llama3_scaling_comes_back() -> None:
    rope = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    factors = inverse_frequencies(rope, 500000.0, 64)
    assert (factors[0], factors[-1]) == (1, 32)
    assert llama3_scaling(factors, 500000.0, 64) == {"rope_type": "llama3", **rope}
    factors[3] = 7
    with pytest.raises(ModelError, match="not the scaling"):
        llama3_scaling(factors, 500000.0, 64)


def test_a_split_model_loads(tmp_path: Path, tiny_gguf: Path) -> None:
    reader = gguf.GGUFReader(tiny_gguf)
    half = len(reader.tensors) // 2
    for number, part in enumerate((reader.tensors[:half], reader.tensors[half:]), 1):
        writer = gguf.GGUFWriter(tmp_path / f"t-{number:05d}-of-00002.gguf", "llama")
        if number == 1:
            for field in reader.fields.values():
                if field.name.startswith(("llama.", "tokenizer.")):
                    kind = field.types[0]
                    writer.add_key_value(
                        field.name, field.contents(), kind, field.types[-1] if len(field.types) > 1 else None
                    )
        writer.add_uint16("split.no", number - 1)
        writer.add_uint16("split.count", 2)
        writer.add_int32("split.tensors.count", len(reader.tensors))
        for tensor in part:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    ours, theirs = dict(iterate_tensors(tmp_path)), load_file(TINY / "model.safetensors")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k].float(), theirs[k].float()) for k in ours)
    (tmp_path / "t-00002-of-00002.gguf").unlink()
    with pytest.raises(ModelError, match="00002-of-00002"):
        read_config(tmp_path)


def test_a_model_is_split_as_it_is_written(tmp_path: Path, tiny_gguf: Path) -> None:
    """gguf-py reads each part, and the parts are the model, bit for bit."""
    done("convert", TINY, tmp_path / "parts" / "t.gguf", "--split-size", "5M")
    files = sorted((tmp_path / "parts").iterdir())
    assert [file.name for file in files] == [f"t-{i:05d}-of-00004.gguf" for i in range(1, 5)]
    names = []
    for number, file in enumerate(files):
        reader = gguf.GGUFReader(file)
        fields = [reader.fields[key] for key in ("split.no", "split.count", "split.tensors.count")]
        kinds = gguf.GGUFValueType
        assert [(f.contents(), f.types) for f in fields] == [
            (number, [kinds.UINT16]), (4, [kinds.UINT16]), (74, [kinds.INT32]),
        ]  # fmt: skip
        assert sum(t.n_bytes for t in reader.tensors) <= 5_000_000
        assert ("llama.block_count" in reader.fields) == (number == 0)
        names += [t.name for t in reader.tensors]
    assert names == [t.name for t in gguf.GGUFReader(tiny_gguf).tensors]
    wanted = load_file(TINY / "model.safetensors")
    for start in (files[0], files[2], tmp_path / "parts"):
        found = dict(iterate_tensors(start))
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[k].float(), wanted[k].float()) for k in found)
    assert "checksums hold" in done("verify", tmp_path / "parts")
    done("convert", tmp_path / "parts", tmp_path / "whole.gguf", "--split-size", "1G")
    done("convert", tiny_gguf, tmp_path / "again.gguf")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "again.gguf").read_bytes()
    result = wherry("convert", TINY, tmp_path / "parts" / "t.gguf", "--split-size", "5M")
    assert result.exit_code == 1
    assert "target_exists" in result.output
    assert sorted((tmp_path / "parts").iterdir()) == files


def test_checksums_tell_what_a_header_cannot(tmp_path: Path, tiny_gguf: Path) -> None:
    done("convert", tiny_gguf, tmp_path / "dir")
    for path in (Path(shutil.copy(tiny_gguf, tmp_path / "t.gguf")), tmp_path / "dir" / "model.safetensors"):
        assert "74 checksums hold" in done("verify", path)
        with path.open("r+b") as file:
            file.seek(-1000, os.SEEK_END)
            byte = file.read(1)[0]
            file.seek(-1000, os.SEEK_END)
            file.write(bytes([byte ^ 1]))
        result = wherry("verify", path)
        assert result.exit_code == 1
        assert "SHA-256 differs" in result.output
        path.write_bytes(path.read_bytes()[:-4096])
        result = wherry("verify", path)
        assert result.exit_code == 1
        assert "truncated" in result.output
    assert "no checksums are recorded" in done("verify", TINY)


def test_checksums_that_another_tool_copied_are_not_believed(tmp_path: Path, tiny_gguf: Path) -> None:
    """llama.cpp's quantizer keeps metadata that it does not know."""
    reader = gguf.GGUFReader(tiny_gguf)
    writer = gguf.GGUFWriter(tmp_path / "t.gguf", "llama")
    for name in ("wherry.sha256", "wherry.layout"):
        field = reader.fields[name]
        writer.add_key_value(name, field.contents(), field.types[0], field.types[-1] if len(field.types) > 1 else None)
    for tensor in reader.tensors:
        writer.add_tensor(tensor.name, np.zeros(tensor.shape[::-1], np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert "no checksums are recorded" in done("verify", tmp_path / "t.gguf")


def test_inspect_tells_what_is_there(tmp_path: Path, tiny_gguf: Path) -> None:
    shown = done("inspect", tiny_gguf)
    for part in (
        "GGUF v3",
        "74 tensors",
        "7,999,744 weights",
        "blk.7.ffn_down.weight",
        "llama.context_length",
        "[8192 of str]",
    ):
        assert part in shown
    (file,) = json.loads(done("inspect", "--json", TINY))
    assert file["format"] == "safetensors"
    assert {"name": "model.norm.weight", "type": "BF16", "shape": [256], "nbytes": 512} in file["tensors"]
    done("convert", TINY, tmp_path / "q.gguf", "--type", "Q8_0")
    assert re.search(r"Q8_0 +57 .+ int8-g32\n", done("inspect", tmp_path / "q.gguf"))
    renamed = Path(shutil.copy(tiny_gguf, tmp_path / "model.safetensors.txt"))
    assert "GGUF v3" in done("inspect", renamed, "--no-tensors")


def test_looking_at_a_model_needs_no_torch() -> None:
    """It takes seconds to import."""
    code = "import sys, wherry_cli.inspect, wherry_cli.verify, wherry_cli.convert; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


REFUSED: dict[str, tuple[list[str], str]] = {
    "no such model": (["/nowhere", "out.gguf"], "model_not_found"),
    "no such type": ([str(TINY), "out.gguf", "--type", "Q9"], "unknown_type"),
    "a type that is read only": ([str(TINY), "out.gguf", "--type", "IQ2_XS"], "unknown_type"),
    "a block type in safetensors": ([str(TINY), "out", "--type", "Q4_0"], "unknown_type"),
    "no such format": ([str(TINY), "out", "--to", "onnx"], "unknown_format"),
    "a size that is none": ([str(TINY), "out.gguf", "--split-size", "4 GB"], "bad_size"),
    "parts of safetensors": ([str(TINY), "out", "--split-size", "4G"], "bad_size"),
    "what is there": ([str(TINY), "."], "target_exists"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_conversions_that_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    args, code = REFUSED[name]
    result = wherry("convert", *args)
    assert result.exit_code == 1
    assert code in result.output
    assert list(tmp_path.iterdir()) == []


def test_pickles_are_read_only_when_allowed(tmp_path: Path) -> None:
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    result = wherry("convert", source, tmp_path / "out")
    assert result.exit_code == 1
    assert "--allow-pickle" in result.output
    done("convert", source, tmp_path / "out", "--allow-pickle")
    assert same_tensors(tmp_path / "out", TINY)


class Evil:
    """Unpickled, it would run a command."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch canary",)


def test_a_pickle_that_runs_code_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    source = Path(shutil.copytree(TINY, tmp_path / "source"))
    (source / "model.safetensors").unlink()
    torch.save({"a": Evil()}, source / "pytorch_model.bin")
    result = wherry("convert", source, tmp_path / "out", "--allow-pickle")
    assert result.exit_code == 1
    assert not (tmp_path / "canary").exists()


SLOW = """
import sys, time
from wherry_runtime.formats.conversion import output
from wherry_cli.main import main
encode = output.converted
def slow(*args):
    for piece in encode(*args):
        print("piece", flush=True)
        time.sleep(0.02)
        yield piece
import wherry_runtime.formats.conversion.to_gguf as g, wherry_runtime.formats.conversion.to_safetensors as s
g.converted = s.converted = slow
main()
"""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
@pytest.mark.parametrize("target", ["out.gguf", "out"])
def test_what_is_interrupted_never_looks_whole(tmp_path: Path, how: signal.Signals, target: str) -> None:
    command = [sys.executable, "-c", SLOW, "convert", str(TINY), str(tmp_path / target)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for _ in range(20):
            assert process.stdout.readline() == "piece\n"
        process.send_signal(how)
        process.communicate()
    assert process.returncode != 0
    left = [p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".json"]
    assert how == signal.SIGKILL or not left
    for path in left:
        assert ".partial" in str(path.relative_to(tmp_path))
        with pytest.raises(ModelError):
            list(iterate_tensors(path if path.name != "model.safetensors" else path.parent))
    assert not (tmp_path / target).exists()
    done("convert", TINY, tmp_path / target)
    assert "74 checksums hold" in done("verify", tmp_path / target)


def test_memory_does_not_grow_with_a_tensor(tmp_path: Path) -> None:
    """64 MiB become Q8_0 in pieces."""
    path = tmp_path / "embedding"
    np.random.default_rng(0).standard_normal(1 << 24, np.float32).tofile(path)
    big = np.memmap(path, np.uint8, "r")
    config = json.loads((TINY / "config.json").read_text())
    tensor = SourceTensor("model.embed_tokens.weight", (1 << 16, 256), type_named("F32"), lambda: big)
    tracemalloc.start()
    try:
        to_gguf(Source(TINY, config, [tensor]), tmp_path / "m.gguf", type_named("Q8_0"), lambda _: None)
        assert tracemalloc.get_traced_memory()[1] < 40 << 20
    finally:
        tracemalloc.stop()
    (info,) = GGUFFile.open(tmp_path / "m.gguf").header.tensors.values()
    assert (info.type.name, info.shape) == ("Q8_0", (1 << 16, 256))


def test_types_of_tensors_follow_their_rows(tmp_path: Path) -> None:
    to_gguf(open_source(TINY), tmp_path / "m.gguf", type_named("Q4_0"), lambda _: None)
    infos = GGUFModel.open([tmp_path / "m.gguf"]).infos
    assert {infos[n].type.name for n in ("blk.0.attn_q.weight", "blk.0.ffn_down.weight")} == {"Q4_0"}
    assert infos["token_embd.weight"].type.name == "Q6_K"  # it is the head, too
