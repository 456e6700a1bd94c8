"""Fuzzes both header parsers: `python -m tests.runtime.formats.fuzz --executions 1000000`.

Coverage-guided (atheris, libFuzzer), from seeds of good files, their truncations and every broken file of the tests. An
input may be read or refused with ModelError. Anything else is a finding: another exception, a read outside the file, a
tensor outside it, more than 5 s, more than 1 GiB of memory.
"""

import argparse
import sys
import tempfile
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(include=["wherry_runtime.formats"]):
    from wherry_runtime.formats.gguf.reader import parse_header as parse_gguf
    from wherry_runtime.formats.safetensors.reader import parse_header as parse_safetensors

from tests.runtime.formats.files import small_gguf, small_safetensors
from tests.runtime.formats.test_headers import BAD_GGUF, BAD_SAFETENSORS

from wherry_runtime.loading.errors import ModelError


class Guarded(bytes):
    """Bytes of which nothing outside is asked for: plain slices would quietly be shorter."""

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice) and not 0 <= (at.start or 0) <= at.stop <= len(self):
            raise AssertionError(f"reads [{at.start}:{at.stop}] of {len(self)} bytes")
        return super().__getitem__(at)


def one(data: bytes) -> None:
    """Both parsers on an input; GGUF's magic is put in front for one of them, so that little is lost on it."""
    for parse, buffer in (
        (parse_gguf, Guarded(b"GGUF" + data[4:])),
        (parse_safetensors, Guarded(data)),
    ):
        try:
            found = parse(buffer, len(buffer))
        except ModelError:
            continue
        for info in found.tensors.values():
            assert found.data_start <= info.offset <= info.offset + info.nbytes <= len(buffer), info


def seeds(directory: Path) -> None:
    good = [small_gguf(directory / "seed"), small_safetensors()]
    (directory / "seed").unlink()
    inputs = [*good, *(d for d, _ in BAD_GGUF.values()), *(d for d, _ in BAD_SAFETENSORS.values() if len(d) < 4096)]
    inputs += [data[:size] for data in good for size in range(8, len(data), 97)]
    for i, data in enumerate(inputs):
        (directory / f"{i:04d}").write_bytes(data)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    arguments.add_argument("--executions", type=int, default=20_000)
    arguments.add_argument("--seconds", type=int, default=0, help="end after so many, whatever was executed; 0: do not")
    arguments.add_argument("--seed", type=int, default=1)
    chosen = arguments.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        seeds(Path(directory))
        options = {
            "runs": chosen.executions,
            "max_total_time": chosen.seconds,
            "seed": chosen.seed,
            "max_len": 4096,
            "timeout": 5,
            "rss_limit_mb": 1024,
            "artifact_prefix": f"{tempfile.gettempdir()}/wherry-fuzz-",
            "print_final_stats": 1,
        }
        atheris.Setup([sys.argv[0], *(f"-{k}={v}" for k, v in options.items()), directory], one)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
