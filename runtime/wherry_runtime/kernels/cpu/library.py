"""The native library as Python sees it: pools of threads, calls, programs.

`load()` gives the library or says why there is none; the engine then runs on PyTorch. Pointers are taken from tensors
at recording time, so a `Program` keeps every tensor that its calls name.
"""

import ctypes
import functools
import os
from array import array
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

LIBRARY = Path(__file__).resolve().parent / "libwherry_cpu.so"
INTERFACE = 4  # `wherry_interface` of program.cpp
NUM_POINTERS, NUM_NUMBERS, NUM_SCALARS = 10, 14, 4

Longs = Sequence[int] | npt.NDArray[np.int64]
Int32s = npt.NDArray[np.int32]


class NativeUnavailableError(Exception):
    """There are no native kernels for this machine; the message says why."""


class CCall(ctypes.Structure):
    """`Call` of abi.h."""

    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("pointers", ctypes.c_void_p * NUM_POINTERS),
        ("numbers", ctypes.c_int64 * NUM_NUMBERS),
        ("scalars", ctypes.c_double * NUM_SCALARS),
        ("stream", ctypes.c_void_p),
        ("stream_items", ctypes.c_int64),
        ("stream_item_bytes", ctypes.c_int64),
    )


NO_BLOCKS: Int32s = np.zeros(0, np.int32)


class Step:
    """One replay's input; see abi.h. What a program does not read may be left out.

    Args:
        token_ids: may be exchanged later.
    """

    def __init__(
        self,
        rows: int = 0,
        *,
        token_ids: Longs = (),
        positions: Longs = (),
        slots: Longs = (),
        sampled_rows: Longs = (),
        first_rows: Longs = (),
        table_starts: Longs = (),
        block_tables: Int32s = NO_BLOCKS,
    ) -> None:
        if block_tables.dtype != np.int32 or not block_tables.flags.c_contiguous:
            raise TypeError("a step's block tables are contiguous int32")
        parts = (token_ids, positions, slots, sampled_rows, first_rows, table_starts)
        numbers = array("q")
        starts = []
        for part in parts:
            starts.append(len(numbers))
            numbers.extend(part)
        first = numbers.buffer_info()[0]
        pointers = [first + numbers.itemsize * start for start in starts]
        pointers.append(block_tables.ctypes.data)
        step = array("q", (rows, len(sampled_rows), len(table_starts), *pointers))  # `Step` of abi.h
        self.address = step.buffer_info()[0]
        self.rows = rows
        self.sampled_rows = sampled_rows
        self._numbers = memoryview(numbers)  # which then cannot be moved any more
        self._kept = (step, block_tables)

    def put_tokens(self, token_ids: list[int]) -> None:
        """Exchanges all of `token_ids`."""
        self._numbers[: len(token_ids)] = array("q", token_ids)


class _Functions:
    """The C functions, with their types."""

    def __init__(self, path: Path) -> None:
        lib = ctypes.CDLL(str(path))
        pointer, number = ctypes.c_void_p, ctypes.c_int64

        def function(name: str, result: type | None, *arguments: type) -> "ctypes._NamedFuncPointer":
            f = getattr(lib, name)
            f.restype, f.argtypes = result, list(arguments)
            return f  # type: ignore[no-any-return]

        self.interface = function("wherry_interface", number)
        self.target = function("wherry_target", ctypes.c_char_p)
        self.kernel = function("wherry_kernel", pointer, ctypes.c_char_p)
        self.pool_new = function("wherry_pool_new", pointer, number, pointer, number)
        self.pool_free = function("wherry_pool_free", None, pointer)
        self.program_new = function("wherry_program_new", pointer, pointer)
        self.program_free = function("wherry_program_free", None, pointer)
        self.program_add = function("wherry_program_add", None, pointer, ctypes.POINTER(CCall))
        self.replay = function("wherry_replay", None, pointer, number)
        self.program_profile = function("wherry_program_profile", None, pointer, pointer, pointer)
        sizes, source = (number,) * 4, (pointer, number, number, number)
        self.pack = function("wherry_pack", None, number, number, pointer, pointer, *sizes, *source)
        self.read_bandwidth = function("wherry_read_bandwidth", ctypes.c_double, pointer, number)


@functools.cache
def load() -> _Functions:
    """The library.

    Raises:
        NativeUnavailableError: it was not built, cannot be loaded, or knows no instruction set of this processor.
    """
    path = Path(os.environ.get("WHERRY_CPU_LIBRARY") or LIBRARY)
    if not path.exists():
        raise NativeUnavailableError(
            f"{path} is not there; where there is a C++ compiler, `python -m wherry_runtime.kernels.cpu.build` makes it"
        )
    try:
        functions = _Functions(path)
    except (OSError, AttributeError) as e:
        raise NativeUnavailableError(f"{path} cannot be loaded: {e}") from e
    if functions.interface() != INTERFACE:
        raise NativeUnavailableError(
            f"{path} is of another version; `python -m wherry_runtime.kernels.cpu.build` makes it anew"
        )
    if functions.target() == b"none":
        raise NativeUnavailableError("this processor lacks AVX2, or WHERRY_CPU_TARGET names a set that it has not")
    return functions


def available() -> bool:
    """Whether there are native kernels for this machine."""
    try:
        load()
    except NativeUnavailableError:
        return False
    return True


def target() -> str:
    """The instruction set in use, such as `avx512bf16`."""
    return str(load().target().decode())


class Pool:
    """Threads that run programs together; the caller is the first of them.

    Args:
        threads: at least 1.
        cores: where to pin each thread; none: wherever the kernel likes.
    """

    def __init__(self, threads: int, cores: Sequence[int] = ()) -> None:
        self._lib = load()
        self.threads = threads
        numbers = array("q", cores)
        self.handle = self._lib.pool_new(threads, numbers.buffer_info()[0], len(cores))

    def __del__(self) -> None:
        if handle := getattr(self, "handle", None):
            self._lib.pool_free(handle)


class Program:
    """A flat list of kernel calls over fixed buffers, replayed for each step.

    Not safe for two threads at once: the buffers are its own.
    """

    def __init__(self, pool: Pool) -> None:
        self._lib = load()
        self.pool = pool
        self.names: list[str] = []
        self._kept: list[torch.Tensor] = []
        self.handle = self._lib.program_new(pool.handle)

    def __del__(self) -> None:
        if handle := getattr(self, "handle", None):
            self._lib.program_free(handle)

    def add(
        self,
        name: str,
        tensors: Sequence[torch.Tensor | None] = (),
        numbers: Sequence[int] = (),
        scalars: Sequence[float] = (),
        streams: tuple[torch.Tensor, int] | None = None,
    ) -> None:
        """Appends a call of the kernel `name`; its operands are described in its source file.

        Args:
            streams: the operand that the call reads from memory and into how many equal work items it divides it.
                Threads that wait for others before the call bring the beginning of their items nearer.

        Raises:
            KeyError: no such kernel.
        """
        kernel = self._lib.kernel(name.encode())
        if not kernel:
            raise KeyError(f"no kernel is named {name!r}")
        self._kept += [t for t in tensors if t is not None]
        pointers = [0 if t is None else t.data_ptr() for t in tensors]
        call = CCall(
            kernel,
            (ctypes.c_void_p * NUM_POINTERS)(*pointers),
            (ctypes.c_int64 * NUM_NUMBERS)(*numbers),
            (ctypes.c_double * NUM_SCALARS)(*scalars),
            *((streams[0].data_ptr(), streams[1], streams[0].nbytes // streams[1]) if streams else (None, 0, 0)),
        )
        self.names.append(name)
        self._lib.program_add(self.handle, ctypes.byref(call))

    def run(self, step: Step) -> None:
        """Replays all calls. Blocks, without the interpreter's lock."""
        Replay([(self, step)]).run()

    def profile(self, step: Step) -> list[tuple[str, float]]:
        """Replays all calls and tells each one's name and seconds, barrier included."""
        seconds = np.zeros(len(self.names))
        self._lib.program_profile(self.handle, step.address, seconds.ctypes.data)
        return list(zip(self.names, seconds.tolist(), strict=True))


class Replay:
    """Programs of the same pool, at least one, that run one after the other: its threads wake up once."""

    def __init__(self, programs: Sequence[tuple[Program, Step]]) -> None:
        self._programs = programs
        self._pairs = array("q", [n for program, step in programs for n in (program.handle, step.address)])
        self.last = programs[-1][1]

    def run(self) -> None:
        """Blocks, without the interpreter's lock."""
        load().replay(self._pairs.buffer_info()[0], len(self._programs))


def read_bandwidth(pool: Pool, num_bytes: int = 1 << 29) -> float:
    """Bytes per second that `pool` reads from memory in huge pages, median of several passes: the limit of decode."""
    return float(load().read_bandwidth(pool.handle, num_bytes))
