"""Records a model's step as programs of native kernels.

The model's plain Python runs once, against operations that append calls instead of computing. What flows between them
are `Value`s, each holding a buffer with room for the largest step. A buffer is free again when the last reference to
its value goes, so the recording reuses memory just as the model's own code lets go of it.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from wherry_runtime.attention.native import AttentionKernels
from wherry_runtime.kernels.cpu.library import Pool, Program, Step
from wherry_runtime.layers.activation import Activation
from wherry_runtime.layers.experts import Experts
from wherry_runtime.layers.linear import Linear
from wherry_runtime.layers.norm import LayerNorm, Norm, RMSNorm
from wherry_runtime.loading.config import ActivationKind
from wherry_runtime.models.ops import Attention
from wherry_runtime.parallel.shard import Span
from wherry_runtime.quantization.formats import padded_inputs
from wherry_runtime.quantization.huge_pages import map_memory
from wherry_runtime.quantization.packed import PackedMatrix, Table

CACHE_LINE = 64
# Rows a whole number of pages apart would all meet in the same few sets of the first cache.
SKEW = 64  # elements
REGION = 64 << 20  # bytes of address space at a time
FUNCTIONS: tuple[ActivationKind, ...] = ("silu", "gelu", "gelu_tanh", "relu", "relu2")  # activation.cpp numbers them so


def aligned(dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
    """[rows, columns] of zeros that begins on a cache line."""
    size = rows * columns * dtype.itemsize
    raw = torch.zeros(size + CACHE_LINE, dtype=torch.uint8)
    start = -raw.data_ptr() % CACHE_LINE
    return raw[start : start + size].view(dtype).view(rows, columns)


class Arena:
    """Memory for what flows between calls, by first fit: what is free again serves whatever fits in.

    Pages take room once a step was large enough to write to them.
    """

    def __init__(self) -> None:
        self._regions: list[torch.Tensor] = []
        self._holes: list[list[tuple[int, int]]] = []  # of each region: free ranges, ascending, never adjacent
        self._reached: list[int] = []  # of each region: how far it was ever in use
        self._kept: dict[object, list[torch.Tensor]] = defaultdict(list)
        self._kept_bytes = 0

    @property
    def num_bytes(self) -> int:
        return self._kept_bytes + sum(self._reached)

    def take_kept(self, purpose: object, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] float32: zeros, or what a value of the same purpose and shape left."""
        if free := self._kept[purpose, rows, columns]:
            return free.pop()
        self._kept_bytes += 4 * rows * columns
        return aligned(torch.float32, rows, columns)

    def give_back_kept(self, purpose: object, buffer: torch.Tensor) -> None:
        """Makes what `take_kept` gave free for others of the same purpose."""
        self._kept[purpose, *buffer.shape].append(buffer)

    def take(self, dtype: torch.dtype, rows: int, columns: int) -> torch.Tensor:
        """[rows, columns] with whatever was left there."""
        size = _rounded(rows * columns * dtype.itemsize)
        index, hole = next(
            ((i, h) for i, holes in enumerate(self._holes) for h in holes if h[1] - h[0] >= size), (-1, (0, 0))
        )
        if index < 0:
            self._regions.append(map_memory(max(REGION, size)))
            index, hole = len(self._regions) - 1, (0, len(self._regions[-1]))
            self._holes.append([hole])
            self._reached.append(0)
        start, end = hole
        place = self._holes[index].index(hole)
        self._holes[index][place : place + 1] = [(start + size, end)] if end - start > size else []
        self._reached[index] = max(self._reached[index], start + size)
        data = self._regions[index][start : start + rows * columns * dtype.itemsize]
        return data.view(dtype).view(rows, columns)

    def give_back(self, buffer: torch.Tensor) -> None:
        """Makes what `take` gave free for others."""
        address, size = buffer.data_ptr(), _rounded(buffer.nbytes)
        for region, holes in zip(self._regions, self._holes, strict=True):
            start = address - region.data_ptr()
            if 0 <= start < len(region):
                holes.append((start, start + size))
                holes.sort()
                holes[:] = _merged(holes)
                return
        raise ValueError("memory of another arena")


def _rounded(size: int) -> int:
    return -(-size // CACHE_LINE) * CACHE_LINE


def _merged(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Ascending ranges, with those that touch made one."""
    merged: list[tuple[int, int]] = []
    for start, end in ranges:
        if merged and merged[-1][1] == start:
            start = merged.pop()[0]
        merged.append((start, end))
    return merged


class Rows:
    """What flows between calls: rows of `width` float32 columns, `stride` elements apart."""

    def __init__(self, width: int, stride: int, buffer: torch.Tensor, *, sampled: bool = False) -> None:
        self.width = width
        self.stride = stride
        self.buffer = buffer
        self.sampled = sampled  # whether they are those that draw a token


class Value(Rows):
    """Rows with zeros from the width to the stride: what matrix products read as padding.

    Memory is shared with whatever comes after. Where there is padding, only with values of the same width, so that it
    stays zero; and logits keep theirs, as they are read after the step.
    """

    def __init__(self, arena: Arena, rows: int, width: int, *, sampled: bool) -> None:
        stride = padded_inputs(width)
        self._arena = arena
        self._shared = width == stride and not sampled
        buffer = arena.take(torch.float32, rows, stride) if self._shared else arena.take_kept(width, rows, stride)
        super().__init__(width, stride, buffer, sampled=sampled)

    def __del__(self) -> None:
        if self._shared:
            self._arena.give_back(self.buffer)
        else:
            self._arena.give_back_kept(self.width, self.buffer)


@dataclass(slots=True, frozen=True)
class Capacity:
    """The largest step."""

    rows: int
    sampled: int


class Ranks(Protocol):
    """How this rank's values come together with the others', on the native kernels."""

    def summand(self, width: int) -> Rows:
        """Where to write this rank's summand of T rows."""

    def record_sum(self, recorder: "Recorder", summand: Rows, out: Rows, *, add: bool) -> None:
        """Records out = Σ summands, or out += it."""

    def record_logits(self, recorder: "Recorder", tokens: Span, multiply: Callable[[Rows], None]) -> Rows:
        """Records `multiply`, which gets where to write the logits of `tokens`, and what brings together all ranks'.

        Returns:
            where all of them are, on the first rank.
        """


@dataclass(slots=True, frozen=True)
class Stage:
    """A program, and what the ranks exchange after it without the kernels' help, if anything."""

    program: Program
    exchange: Callable[[Step], None] | None = None


class Recorder:
    """`Ops` that append calls to `program`. `attention.native.unsupported` keeps models away that need more.

    Args:
        attention: None where nothing attends.
        ranks: None where this one computes the model alone.
        dtype: the model's.
    """

    def __init__(
        self,
        pool: Pool,
        capacity: Capacity,
        attention: AttentionKernels | None = None,
        ranks: Ranks | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        self.program = Program(pool)
        self.arena = Arena()
        self.capacity = capacity
        self._stages: list[Stage] = []
        self._attention = attention
        self._ranks = ranks
        self._dtype = dtype

    def exchange(self, exchange: Callable[[Step], None]) -> None:
        """Ends the program with an exchange; what is recorded from here on goes into another."""
        self._stages.append(Stage(self.program, exchange))
        self.program = Program(self.program.pool)

    def take_stages(self) -> list[Stage]:
        """What was recorded since the last time."""
        stages, self._stages = [*self._stages, Stage(self.program)], []
        self.program = Program(self.program.pool)
        return stages

    def _meeting(self) -> Ranks:
        if self._ranks is None:
            raise TypeError("a part of a model was given to a rank that is alone")
        return self._ranks

    def _value(self, width: int, *, sampled: bool = False) -> Value:
        rows = self.capacity.sampled if sampled else self.capacity.rows
        return Value(self.arena, rows, width, sampled=sampled)

    def embed(self, table: Table, tokens: Span) -> Rows:
        width, depth = table.shape[1], 0
        elements: torch.Tensor | None
        if isinstance(table, PackedMatrix):
            depth, elements, left = table.padded_inputs, table.data, table.rows
        else:
            elements, left = table, None
        out = self._value(width)
        rows: Rows = out if tokens.whole else self._meeting().summand(width)
        numbers = [width, rows.stride, _dtype_code(table), tokens.length, tokens.start, depth]
        self.program.add("embed", [elements, rows.buffer, *[None] * 5, left], numbers)
        if not tokens.whole:
            self._meeting().record_sum(self, rows, out, add=False)
        return out

    def add_positions(self, x: Rows, table: torch.Tensor) -> Rows:
        self.program.add("add_positions", [table, x.buffer], [x.width, x.stride, _dtype_code(table)])
        return x

    def scale(self, x: Rows, factor: float) -> Rows:
        rounded = float(torch.tensor(factor, dtype=self._dtype))
        self.program.add("scale", [x.buffer], [x.width, x.stride, x.sampled], [rounded])
        return x

    def shape_logits(self, x: Rows, factor: float, softcap: float | None) -> Rows:
        self.program.add("scale", [x.buffer], [x.width, x.stride, x.sampled], [factor, softcap or 0])
        return x

    def norm(self, norm: Norm, x: Rows) -> Rows:
        return self._norm(norm, x, gather=False)

    def sampled(self, norm: Norm | None, x: Rows) -> Rows:
        return self._norm(norm, x, gather=True)

    def _norm(self, norm: Norm | None, x: Rows, *, gather: bool) -> Rows:
        if not isinstance(norm, RMSNorm | LayerNorm):
            raise TypeError(f"the native kernels have no {type(norm).__name__}")
        out = self._value(x.width, sampled=gather)
        weight = torch.ones(x.width) if norm.weight is None else norm.weight.float()
        tensors, numbers = [x.buffer, weight, out.buffer], [x.width, x.stride, out.stride, gather]
        if isinstance(norm, RMSNorm):
            self.program.add("rms_norm", tensors, numbers, [norm.eps])
        else:
            bias = torch.zeros(x.width) if norm.bias is None else norm.bias.float()
            self.program.add("layer_norm", [*tensors, bias], numbers, [norm.eps])
        return out

    def linear(self, linear: Linear, x: Rows) -> Rows:
        out = self._value(linear.num_outputs, sampled=x.sampled)
        self._multiply(linear, x, out, add=False)
        return out

    def project(self, linear: Linear, x: Rows) -> Rows:
        return self._sum(linear, x, self._value(linear.num_outputs), add=False)

    def add_linear(self, residual: Rows, linear: Linear, x: Rows) -> Rows:
        return self._sum(linear, x, residual, add=True)

    def _sum(self, linear: Linear, x: Rows, out: Rows, *, add: bool) -> Rows:
        """The ranks' products together, to `out` or added to it."""
        if linear.partial:
            summand = self._meeting().summand(out.width)
            self._multiply(linear, x, summand, add=False)
            self._meeting().record_sum(self, summand, out, add=add)
        else:
            self._multiply(linear, x, out, add=add)
        return out

    def add(self, x: Rows, y: Rows, factor: float) -> Rows:
        self.program.add("add_scaled", [x.buffer, y.buffer], [x.width, x.stride, y.stride], [factor])
        return x

    def experts(self, experts: Experts, x: Rows) -> Rows:
        raise TypeError("the native kernels have no experts")

    def logits(self, head: Linear, tokens: Span, x: Rows) -> Rows:
        if tokens.whole:
            return self.linear(head, x)
        return self._meeting().record_logits(self, tokens, lambda out: self._multiply(head, x, out, add=False))

    def activate(self, activation: Activation, x: Rows) -> Rows:
        function = FUNCTIONS.index(activation.kind)
        out = self._value(x.width // 2 if activation.gated else x.width)
        numbers = [out.width, x.stride, out.stride, function, activation.gated]
        self.program.add("activation", [x.buffer, out.buffer], numbers)
        return out

    def attend(self, attention: Attention, qkv: Rows) -> Rows:
        if self._attention is None:
            raise TypeError("a recorder without attention")
        out = self._value(attention.num_heads * attention.head_dim)
        self._attention.record(self.program, attention, (qkv.buffer, qkv.stride), (out.buffer, out.stride))
        return out

    def _multiply(self, linear: Linear, x: Rows, out: Rows, *, add: bool) -> None:
        matrix = linear.packed
        if matrix is None:
            raise TypeError("the native kernels read packed weights only")
        if x.stride != matrix.padded_inputs:
            raise ValueError(f"x has rows of {x.stride}, the weights take {matrix.padded_inputs}")
        operand, stride, scales, sums = self._converted(matrix, x)
        held = matrix.format
        numbers = [matrix.num_panels, matrix.padded_inputs, stride, out.stride, held.group, add, x.sampled]
        numbers += [held.block, held.zero, held.minima]
        name = f"linear_{ {'float32': 'f32', 'bfloat16': 'bf16'}.get(held.method, held.method) }"
        tensors = [operand, matrix.data, out.buffer, linear.bias, matrix.scales, scales, sums, matrix.rows]
        self.program.add(name, tensors, numbers, streams=(matrix.data, matrix.num_panels))
        if held.outliers:
            numbers = [matrix.num_panels, matrix.padded_inputs, x.stride, out.stride, held.group, x.sampled]
            apart = [x.buffer, matrix.data, out.buffer, None, matrix.scales]
            self.program.add("add_outliers", apart, numbers, [held.outliers])
        for buffer in (operand, scales, sums):
            if buffer is not None and buffer is not x.buffer:
                self.arena.give_back(buffer)

    def _converted(
        self, matrix: PackedMatrix, x: Rows
    ) -> tuple[torch.Tensor, int, torch.Tensor | None, torch.Tensor | None]:
        """x as the product takes it: the operand, its stride in elements, its scales and sums."""
        rows, depth, method = x.buffer.shape[0], matrix.padded_inputs, matrix.format.method
        if method == "float32":
            return x.buffer, x.stride, None, None
        dtype = torch.bfloat16 if method == "bfloat16" else torch.int8
        operand = self.arena.take(dtype, rows, depth + SKEW)
        numbers = [depth, x.stride, depth + SKEW, int(x.sampled)]
        if method == "bfloat16":
            self.program.add("to_bf16", [x.buffer, operand], numbers)
            return operand, depth + SKEW, None, None
        groups = depth // matrix.format.group
        scales = self.arena.take(torch.float32, rows, groups)
        sums = self.arena.take(torch.int32, rows, groups)
        numbers.append(matrix.format.group)
        self.program.add("quantize_int8", [x.buffer, operand, scales, sums], numbers, [matrix.format.outliers])
        return operand, depth + SKEW, scales, sums


def _dtype_code(table: Table) -> int:
    """float32 or bfloat16, as the kernels number them."""
    return {torch.float32: 0, torch.bfloat16: 1}[table.dtype]
