"""Reading the fields of a GGUF header: nothing is read that the file does not have, nothing allocated for a claim."""

import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from wherry_runtime.loading.errors import ModelError

Buffer = Any  # bytes or mmap: what slices and has a length
Scalar = int | float | bool | str
Value = Scalar | list[str] | npt.NDArray[Any]

LONGEST_KEY = 65535  # bytes; as the format says
STRING, ARRAY, BOOL = 8, 9, 7
# Value type → (struct format, numpy dtype)
NUMBERS = {
    0: ("<B", "<u1"),
    1: ("<b", "<i1"),
    2: ("<H", "<u2"),
    3: ("<h", "<i2"),
    4: ("<I", "<u4"),
    5: ("<i", "<i4"),
    6: ("<f", "<f4"),
    BOOL: ("<B", "<u1"),
    10: ("<Q", "<u8"),
    11: ("<q", "<i8"),
    12: ("<d", "<f8"),
}


class Cursor:
    """A place in a header that ends at `end`, which is at most the file's size."""

    def __init__(self, buffer: Buffer, end: int) -> None:
        self.buffer = buffer
        self.end = end
        self.at = 0

    def fail(self, why: str) -> ModelError:
        """An error that says where."""
        return ModelError("bad_gguf", f"{why} (at byte {self.at})")

    def need(self, count: int, what: str) -> int:
        """Where the next `count` bytes begin, which are taken.

        Raises:
            ModelError: bad_gguf, when they are not there.
        """
        start = self.at
        if count > self.end - start:
            raise self.fail(f"{what} takes {count} bytes and {self.end - start} are left")
        self.at = start + count
        return start

    def number(self, form: str, what: str) -> Any:
        """A number of the struct format `form`."""
        return struct.unpack_from(form, self.buffer, self.need(struct.calcsize(form), what))[0]

    def count(self, what: str, least: int) -> int:
        """A 64-bit count of things that take at least `least` bytes each."""
        number = int(self.number("<Q", what))
        if number > (self.end - self.at) // least:
            raise self.fail(f"{number} {what} cannot be in the {self.end - self.at} bytes that are left")
        return number

    def string(self, what: str, longest: int | None = None) -> str:
        """A string: its length in 64 bits, then UTF-8."""
        length = int(self.number("<Q", what))
        if longest is not None and length > longest:
            raise self.fail(f"{what} is {length} bytes long; at most {longest} are allowed")
        start = self.need(length, what)
        try:
            return str(self.buffer[start : start + length], "utf-8")
        except UnicodeDecodeError as e:
            raise self.fail(f"{what} is not UTF-8: {e.reason}") from None

    def value(self, key: str) -> Value:
        """A metadata value with its type before it."""
        kind = int(self.number("<I", key))
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            return self._array(key)
        if kind not in NUMBERS:
            raise self.fail(f"{key}: value type {kind} is not known")
        number = self.number(NUMBERS[kind][0], key)
        if kind != BOOL:
            return int(number) if isinstance(number, int) else float(number)
        if number > 1:
            raise self.fail(f"{key}: a bool of {number}")
        return bool(number)

    def _array(self, key: str) -> Value:
        kind = int(self.number("<I", key))
        if kind == STRING:
            count = self.count(f"strings of {key}", 8)
            read: Callable[[str], str] = self.string
            return [read(key) for _ in range(count)]
        if kind not in NUMBERS:
            what = "arrays of arrays are not supported" if kind == ARRAY else f"value type {kind} is not known"
            raise self.fail(f"{key}: {what}")
        dtype = np.dtype(NUMBERS[kind][1])
        count = self.count(f"elements of {key}", dtype.itemsize)
        start = self.need(count * dtype.itemsize, key)
        values = np.frombuffer(self.buffer[start : self.at], dtype=dtype)
        if kind != BOOL:
            return values
        if count and int(values.max()) > 1:
            raise self.fail(f"{key}: a bool that is neither 0 nor 1")
        return values.astype(np.bool_)
