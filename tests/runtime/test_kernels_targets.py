"""The kernels' tests again: for every instruction set, with AMX emulated, and under AddressSanitizer and
UndefinedBehaviorSanitizer. What is compiled for it is kept with the other objects, and so is that a run has passed: it
is repeated when something that it reads has changed.
"""

import functools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tests.runtime.passed_before import Run

from wherry_runtime.kernels.cpu import build, library

HERE = Path(__file__).resolve().parent
FILES = [f"test_kernels_{name}.py" for name in ("attention", "elementwise", "sampling", "linear", "blocks")]
SAMPLING = FILES[2]  # it alone reads what schedules and carries requests, which changes often: a run by itself
AMX = ["test_kernels_linear.py", "test_kernels_amx.py"]
SANITIZERS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-O1", "-g1", "-fno-omit-frame-pointer")
# The slowest, which touch memory just as the rest does.
ALIKE: tuple[str, ...] = ("192-1000", "512-300", "8-8-32", "8-2-128", "4-1-256", "151936")
ALIKE += ("test_threads", "test_chunks", "test_company", "test_sixty_four", "test_many_rows")

pytestmark = [
    pytest.mark.skipif(not library.available(), reason="there are no native kernels on this machine"),
    pytest.mark.timeout(900),
]


def run(arguments: list[str], **environment: str) -> "subprocess.CompletedProcess[str]":
    """Python with these arguments, as if no tests were running around it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "COV_", "WHERRY_CPU_"))}
    return subprocess.run(
        [sys.executable, *arguments],
        env={**inherited, **environment},
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )


def require_target(name: str, **environment: str) -> None:
    """Skips where the library has no such target for this processor."""
    code = "from wherry_runtime.kernels.cpu import library; print(library.target())"
    shown = run(["-c", code], WHERRY_CPU_TARGET=name, **environment)
    if shown.returncode and "names a set that it has not" in shown.stderr:
        pytest.skip(f"this processor cannot run the target {name}")
    assert shown.stdout.strip() == name, shown.stderr


def passes(files: list[str], *arguments: str, **environment: str) -> None:
    """These tests pass in processes of that environment, every one of them; they may have done so before."""
    for group in ([f for f in files if f != SAMPLING], [f for f in files if f == SAMPLING]):
        if group:
            pass_together(group, *arguments, **environment)


def pass_together(files: list[str], *arguments: str, **environment: str) -> None:
    known = {name: Path(value).name for name, value in environment.items()}  # the same in every checkout
    remembered = Run(*files, *arguments, json.dumps(known, sort_keys=True), *SANITIZERS, version())
    if remembered.passed_before():
        return
    paths = [str(HERE / name) for name in files]
    plugins = ["-p", "no:cacheprovider", "-p", "tests.runtime.passed_before"]
    # Captured by Python alone: a sanitizer writes to the process's standard error, and ends it.
    done = run(
        ["-m", "pytest", "-q", "-x", *plugins, "--capture=sys", *paths, *arguments],
        **environment,
        **remembered.environment,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[:4000]
    assert re.search(r"^\d+ passed(, \d+ deselected)? in", done.stdout.splitlines()[-1]), done.stdout[-2000:]
    remembered.passed()


@functools.cache
def version() -> str:
    """Of the compiler, if there is one."""
    try:
        command = build.compiler()
    except build.BuildError:
        return ""
    return subprocess.run([command, "--version"], capture_output=True, text=True, check=True).stdout


@functools.cache
def compiler() -> str:
    """The C++ compiler that knows AMX; skips where there is none."""
    try:
        command = build.compiler()
    except build.BuildError as e:
        pytest.skip(str(e))
    if not build.knows_amx(command):
        pytest.skip(f"{command} does not know AMX; GCC 11 does")
    return command


@functools.cache
def emulated() -> str:
    """The library with AMX emulated: as many files more as there are for AMX; the rest is as in the library itself."""
    compiler()
    output = build.HERE / ".objects" / "emulated" / build.LIBRARY.name
    output.parent.mkdir(parents=True, exist_ok=True)
    return str(build.build(output, emulate_amx=True))


@functools.cache
def sanitized() -> dict[str, str]:
    """The environment of the library with sanitizers, and AMX emulated: they do not see what its instructions touch."""
    command = compiler()
    found = subprocess.run([command, "-print-file-name=libasan.so"], capture_output=True, text=True, check=True)
    runtime = found.stdout.strip()
    if not Path(runtime).is_absolute() or "clang" in Path(command).resolve().name:
        pytest.skip(f"{command} comes without GCC's AddressSanitizer")
    output = build.HERE / ".objects" / "sanitized" / build.LIBRARY.name
    output.parent.mkdir(parents=True, exist_ok=True)
    build.build(output, SANITIZERS, emulate_amx=True)
    return {
        "WHERRY_CPU_LIBRARY": str(output),
        "LD_PRELOAD": runtime,
        # Python keeps what it has to the end; the rest is about where memory is touched.
        "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
        "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    }


@pytest.mark.parametrize("target", list(build.TARGETS))
def test_every_target(target: str) -> None:
    require_target(target)
    if target == library.target() and "WHERRY_CPU_TARGET" not in os.environ:
        return  # what all other tests run on
    few_lines = target == "avx512" and library.target() == "avx512bf16"  # differ, all in how bfloat16 is multiplied
    passes([f for f in FILES if "linear" in f] if few_lines else FILES, WHERRY_CPU_TARGET=target)


def test_emulated_amx() -> None:
    """The matrix products of AMX, their source unchanged, on instructions that are computed in C++."""
    environment = {"WHERRY_CPU_LIBRARY": emulated()}
    require_target("amx", **environment)
    passes(AMX, WHERRY_CPU_TARGET="amx", **environment)


def test_instructions_of_amx() -> None:
    """What the emulation stands for is in the library."""
    compiler()
    if shutil.which("objdump") is None:
        pytest.skip("there is no objdump")
    shown = subprocess.run(
        ["objdump", "--disassemble", "--no-show-raw-insn", str(build.LIBRARY)],
        capture_output=True,
        text=True,
        check=True,
    )
    names = set(re.findall(r"^\s+[0-9a-f]+:\s+([a-z0-9]+)", shown.stdout, re.MULTILINE))
    assert {"ldtilecfg", "tileloadd", "tilezero", "tdpbsud", "tdpbf16ps", "tilestored", "tilerelease"} <= names


@pytest.mark.parametrize("target", ["avx2", "avx512bf16", "amx"])
def test_sanitizers(target: str) -> None:
    """No reads or writes outside, nothing undefined. avx512 is avx512bf16 but for a few lines."""
    environment = sanitized()
    require_target(target, **environment)
    files, left_out = FILES, ALIKE
    if target == "amx":  # bfloat16, int8 by whole tiles and int4 by half ones
        files, left_out = AMX, (*ALIKE, "float32", "g32", "g64", "g128")
    chosen = f"not ({' or '.join(left_out)})"
    passes(files, "-p", "tests.runtime.heap_memory", "-k", chosen, WHERRY_CPU_TARGET=target, **environment)


def test_sanitizers_see_a_row_too_many() -> None:
    """That they are at work: the library's own accesses to PyTorch's memory are watched."""
    code = """
import torch
from wherry_runtime.kernels.cpu.library import Pool, Program, Step
program = Program(Pool(1))
program.add("activation", [torch.zeros(2, 128), torch.zeros(2, 64)], [64, 128, 64, 0, 1])
program.run(Step(2))
print("two rows of two", flush=True)
program.run(Step(3))
"""
    environment = sanitized()
    require_target("avx2", **environment)
    done = run(["-c", code], WHERRY_CPU_TARGET="avx2", **environment)
    assert done.returncode
    assert done.stdout == "two rows of two\n"
    assert "heap-buffer-overflow" in done.stderr
