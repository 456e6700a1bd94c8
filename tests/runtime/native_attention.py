"""Helpers: sequences that go through the native rotation, cache and attention in any chunks and any company."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from wherry_runtime.attention.native import AttentionKernels
from wherry_runtime.kernels import reference
from wherry_runtime.kernels.cpu.library import Pool, Program, Step
from wherry_runtime.kvcache.formats import FORMATS
from wherry_runtime.kvcache.native import NativeKVCache
from wherry_runtime.layers.norm import RMSNorm
from wherry_runtime.layers.rope import Rope
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.loading.rope_config import RopeConfig
from wherry_runtime.models.decoder import slopes
from wherry_runtime.models.ops import Attention


def model_config(num_heads: int, num_kv_heads: int, head_dim: int, context: int) -> ModelConfig:
    """One layer of that shape."""
    return ModelConfig(
        family="test",
        architecture="test",
        dtype="float32",
        vocab_size=8,
        hidden_size=64,
        intermediate_size=64,
        num_layers=1,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        max_position_embeddings=context,
        norm_eps=1e-6,
        rope=RopeConfig(),
        tie_word_embeddings=True,
    )


@dataclass
class Shape:
    """What a case varies."""

    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int = 64
    block_size: int = 16
    stored: str = "bfloat16"
    window: int | None = None
    normed: bool = False
    softcap: float | None = None
    alibi: bool = False
    clip: float | None = None
    threads: int = 2
    rows: int = 600
    context: int = 2048

    @property
    def width(self) -> int:
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


def random_qkv(shape: Shape, length: int, seed: int) -> torch.Tensor:
    """[length, width] float32; queries large enough for a softmax that is not flat."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(length, shape.width, generator=generator)
    qkv[:, : shape.num_heads * shape.head_dim] *= 2
    return qkv


@dataclass
class Fed:
    """A sequence, as far as it has been computed."""

    qkv: torch.Tensor
    done: int = 0
    blocks: list[int] = field(default_factory=list)
    rows: list[torch.Tensor] = field(default_factory=list)

    @property
    def out(self) -> torch.Tensor:
        return torch.cat(self.rows)


class Layer:
    """One layer on the native kernels, with a cache of its own whose blocks are handed out in a shuffled order."""

    def __init__(self, shape: Shape, *, num_blocks: int = 512, garbage: bool = True) -> None:
        self.shape = shape
        config = model_config(shape.num_heads, shape.num_kv_heads, shape.head_dim, shape.context)
        self.cache = NativeKVCache(config, num_blocks, shape.block_size, stored=FORMATS[shape.stored])
        if garbage and shape.stored == "fp8":  # what earlier owners left: finite, but anything
            self.cache.layers[0].random_(0, 127, generator=torch.Generator().manual_seed(3))
        rope = Rope(config.rope, shape.head_dim, shape.context, dtype=torch.float32, device=torch.device("cpu"))
        self.rope = rope.tables()
        norms = [self._norm(i) if shape.normed else None for i in range(2)]
        self.attention = Attention(
            layer=0,
            num_heads=shape.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            window=shape.window,
            query_norm=norms[0],
            key_norm=norms[1],
            softcap=shape.softcap,
            slopes=slopes(shape.num_heads) if shape.alibi else None,
            clip=shape.clip,
        )
        self.program = Program(Pool(shape.threads))
        kernels = AttentionKernels(config, self.cache, [rope], shape.rows, shape.threads)
        self.qkv = torch.zeros(shape.rows, -(-shape.width // 64) * 64)
        self.out = torch.full((shape.rows, -(-shape.num_heads * shape.head_dim // 64) * 64), 7.0)
        kernels.record(self.program, self.attention, (self.qkv, self.qkv.shape[1]), (self.out, self.out.shape[1]))
        self.free = torch.randperm(num_blocks, generator=torch.Generator().manual_seed(5)).tolist()

    def _norm(self, index: int) -> RMSNorm:
        norm = RMSNorm("n", self.shape.head_dim, 1e-6, dtype=torch.float32, device=torch.device("cpu"))
        norm.weight.copy_(torch.rand(self.shape.head_dim, generator=torch.Generator().manual_seed(index)) + 0.5)
        return norm

    def step(self, parts: Sequence[tuple[Fed, int]]) -> None:
        """Computes the next `count` rows of each sequence, all in one step."""
        size = self.shape.block_size
        arrays: dict[str, list[Any]] = {k: [] for k in ("positions", "slots", "tables", "starts")}
        first_rows = [0]
        for fed, count in parts:
            while len(fed.blocks) * size < fed.done + count:
                fed.blocks.append(self.free.pop())
            positions = range(fed.done, fed.done + count)
            self.qkv[first_rows[-1] : first_rows[-1] + count, : self.shape.width] = fed.qkv[fed.done : fed.done + count]
            arrays["positions"] += positions
            arrays["slots"] += [fed.blocks[p // size] * size + p % size for p in positions]
            arrays["starts"].append(len(arrays["tables"]))
            arrays["tables"] += fed.blocks
            first_rows.append(first_rows[-1] + count)
        step = Step(
            first_rows[-1],
            positions=np.array(arrays["positions"], np.int64),
            slots=np.array(arrays["slots"], np.int64),
            first_rows=np.array(first_rows, np.int64),
            table_starts=np.array(arrays["starts"], np.int64),
            block_tables=np.array(arrays["tables"], np.int32),
        )
        self.program.run(step)
        used = self.shape.num_heads * self.shape.head_dim
        assert (self.out[:, used:] == 7.0).all()
        for (fed, count), row in zip(parts, first_rows, strict=False):
            fed.rows.append(self.out[row : row + count, :used].clone())
            fed.done += count

    def expected(self, qkv: torch.Tensor) -> torch.Tensor:
        """The reference in float64 over what the cache keeps: [length, H * D]."""
        shape = self.shape
        limit = shape.clip or torch.inf
        heads = qkv.clamp(-limit, limit).double().view(len(qkv), -1, shape.head_dim)
        query, key, value = torch.split(heads, [shape.num_heads, shape.num_kv_heads, shape.num_kv_heads], dim=1)
        if self.attention.query_norm is not None and self.attention.key_norm is not None:
            query = reference.rms_norm(query, self.attention.query_norm.weight.double(), 1e-6)
            key = reference.rms_norm(key, self.attention.key_norm.weight.double(), 1e-6)
        cos, sin = (t[: len(qkv)].double() for t in self.rope)
        query, key = reference.rotate(query, cos, sin), reference.rotate(key, cos, sin)
        stored = FORMATS[shape.stored]
        key, value = (reference.as_kept(x.float(), stored).double() for x in (key, value))
        if shape.stored != "float32":
            scale = shape.head_dim**-0.5 / np.log(2)
            query = (query * scale).to(torch.bfloat16).double() / scale
        lost = None if self.attention.slopes is None else self.attention.slopes.double()
        return reference.attention(query, key, value, 0, shape.window, shape.softcap, lost)
