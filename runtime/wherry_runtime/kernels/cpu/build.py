"""Compiles the native library. The wheel's build hook, `make setup` and the sanitizer tests all come here.

    python -m wherry_runtime.kernels.cpu.build [--sanitize address,undefined] [--emulate-amx] [--output FILE]

Nothing but a C++20 compiler is needed, no headers of PyTorch or Python. Objects are kept in the user's cache, by a
digest of everything that went into them: an edit compiles only what it touches, and another checkout nothing.
"""

import argparse
import fcntl
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

HERE = Path(__file__).resolve().parent
SOURCES = HERE / "src"
LIBRARY = HERE / "libwherry_cpu.so"

UNUSED_S = 30 * 24 * 3600.0  # after which an object is thrown away

# Compiled once, for any x86-64 processor of this century's second decade.
COMMON = ("pool.cpp", "program.cpp", "target.cpp", "pack.cpp", "bandwidth.cpp")
COMMON_FLAGS = ("-march=x86-64-v2",)
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mavx512vnni", "-mprefer-vector-width=512")
TARGETS = {"avx2": AVX2, "avx512": AVX512, "avx512bf16": (*AVX512, "-mavx512bf16")}
# Compiled for AMX alone; what they do not replace, that target takes from avx512bf16.
AMX_SOURCES = ("entries_amx.cpp", "linear_amx_float.cpp", "linear_amx_int.cpp")
AMX = (*TARGETS["avx512bf16"], "-mamx-tile", "-mamx-int8", "-mamx-bf16")
# GCC takes the undefined vectors inside its own intrinsics for mistakes of ours: https://gcc.gnu.org/PR105593
NO_WARNINGS = ("-Wno-psabi", "-Wno-ignored-attributes", "-Wno-maybe-uninitialized", "-Wno-uninitialized")
WARNINGS = ("-Wall", "-Wextra", *NO_WARNINGS)
FLAGS = (
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
    *WARNINGS,
)


class BuildError(Exception):
    """The library cannot be compiled here."""


def compiler() -> str:
    """The C++ compiler: `$CXX`, or the first of the usual names.

    Raises:
        BuildError: there is none, or no x86-64 to compile for.
    """
    if platform.machine() not in ("x86_64", "AMD64"):
        raise BuildError(f"the native kernels are written for x86-64, this is {platform.machine()}")
    for name in (os.environ.get("CXX"), "g++", "c++", "clang++"):
        if name and (path := shutil.which(name)):
            return path
    raise BuildError("no C++ compiler was found; on Debian: apt-get install g++")


def knows_amx(command: str) -> bool:
    """Whether this compiler and its assembler have AMX (GCC 11 on); without it the library has the other targets."""
    program = 'void f() { asm("tdpbf16ps %tmm2, %tmm1, %tmm0"); }'
    arguments = [*AMX, "-x", "c++", "-c", "-", "-o", os.devnull]
    return not subprocess.run(
        [command, *arguments], input=program.encode(), capture_output=True, check=False
    ).returncode


def _units(amx: Sequence[str]) -> list[tuple[Path, tuple[str, ...]]]:
    """Each source with the flags of what it is compiled for. `amx`: the definitions that go with AMX, or nothing."""
    units: list[tuple[Path, tuple[str, ...]]] = []
    for source in sorted(SOURCES.glob("*.cpp")):
        if source.name == "target.cpp":
            units.append((source, (*COMMON_FLAGS, *amx)))
        elif source.name in COMMON:
            units.append((source, COMMON_FLAGS))
        elif source.name in AMX_SOURCES:
            units += [(source, (*AMX, *amx, "-DWHERRY_TARGET=amx"))] if amx else []
        else:
            units += [(source, (*flags, f"-DWHERRY_TARGET={target}")) for target, flags in TARGETS.items()]
    return units


def _objects() -> Path:
    """Where what is compiled is kept for the next library: `$WHERRY_CACHE/kernels`, else in the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("WHERRY_CACHE") or Path(base, "wherry")).expanduser() / "kernels"


def build(output: Path = LIBRARY, extra: Sequence[str] = (), *, emulate_amx: bool = False) -> Path:
    """Compiles what changed and links `output`.

    Args:
        output: the library.
        extra: more flags, such as a sanitizer's.
        emulate_amx: target `amx` computes with plain C++ what the instructions would: for tests.

    Raises:
        BuildError: with the compiler's own words.
    """
    command = compiler()
    try:
        objects = _objects()
        objects.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # no home, or one that belongs to somebody else
        objects = output.resolve().parent / ".objects"
        objects.mkdir(parents=True, exist_ok=True)
    emulation = ("-DWHERRY_EMULATE_AMX",) if emulate_amx else ()
    units = _units(("-DWHERRY_AMX", *emulation) if knows_amx(command) else ())
    with open(objects / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another build would clear away what this one has not linked yet
        _build(command, units, extra, objects, output)
    return output


def _build(
    command: str, units: list[tuple[Path, tuple[str, ...]]], extra: Sequence[str], objects: Path, output: Path
) -> None:
    headers = b"".join(p.read_bytes() for p in sorted(SOURCES.glob("*.h")))
    version = subprocess.run([command, "--version"], capture_output=True, check=True).stdout

    def compile_one(unit: tuple[Path, tuple[str, ...]]) -> Path:
        source, flags = unit
        arguments = [*FLAGS, *flags, *extra]
        digest = hashlib.sha256(b"\0".join([version, headers, source.read_bytes(), *(a.encode() for a in arguments)]))
        target = objects / f"{source.stem}-{digest.hexdigest()[:16]}.o"
        if not target.exists():
            partial = target.with_suffix(f".{os.getpid()}.tmp")
            _run([command, *arguments, "-c", str(source), "-o", str(partial)])
            partial.replace(target)
        return target

    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        parts = list(pool.map(compile_one, units))
    record = objects / f"{hashlib.sha256(bytes(output.resolve())).hexdigest()[:16]}.linked"
    names = "\n".join(part.name for part in parts)
    if not output.exists() or not record.exists() or record.read_text() != names:
        partial = output.with_suffix(f".{os.getpid()}.tmp")
        _run([command, "-shared", "-pthread", *extra, *map(str, parts), "-o", str(partial)])
        partial.replace(output)
        record.write_text(names)
    for used in (*parts, record):
        os.utime(used)
    for kept in objects.iterdir():
        if kept.stat().st_mtime < time.time() - UNUSED_S:
            kept.unlink()


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr}")
    if done.stderr:
        print(done.stderr, file=sys.stderr)  # noqa: T201 - a compiler's warnings belong on the terminal


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m wherry_runtime.kernels.cpu.build", description=__doc__)
    parser.add_argument("--output", type=Path, default=LIBRARY)
    parser.add_argument("--sanitize", default="", help="such as address,undefined: instrumented, for tests")
    parser.add_argument("--emulate-amx", action="store_true", help="the target amx without its instructions, for tests")
    arguments = parser.parse_args()
    extra = (f"-fsanitize={arguments.sanitize}", "-g", "-fno-omit-frame-pointer") if arguments.sanitize else ()
    try:
        build(arguments.output, extra, emulate_amx=arguments.emulate_amx)
    except BuildError as e:
        print(f"the native kernels were not built, so the engine will run on PyTorch alone: {e}", file=sys.stderr)  # noqa: T201
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
