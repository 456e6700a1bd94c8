"""Native rotation, KV cache and attention against PyTorch in float64, and bit for bit against themselves."""

from dataclasses import replace

import msgspec
import numpy as np
import pytest
import torch
from tests.runtime.native_attention import Fed, Layer, Shape, model_config, random_qkv

from wherry_runtime.attention.native import unsupported
from wherry_runtime.kernels.cpu import library
from wherry_runtime.kvcache.formats import FORMATS, choose_format, decode, encode
from wherry_runtime.kvcache.native import NativeKVCache
from wherry_runtime.kvcache.paged import bytes_per_token
from wherry_runtime.loading.errors import ModelError

pytestmark = pytest.mark.skipif(not library.available(), reason="the native library is not built")

STORED = ("float32", "bfloat16", "fp8", "int8")
# Over values of about 1 to 4. Float32 sums in another order. With the others queries and softmax weights have 8 bits:
# an error of 2^-9 of each, most of which cancels. int8 adds keys that fall on the other side of a rounding edge (a step
# of absmax / 127), because the reference rotates in float64.
BOUNDS = {"float32": 2e-5, "bfloat16": 0.012, "fp8": 0.012, "int8": 0.03}


def check(layer: Layer, fed: Fed) -> None:
    error = (fed.out - layer.expected(fed.qkv[: fed.done])).abs().max()
    assert error < BOUNDS[layer.shape.stored]


SHAPES = [
    Shape(head_dim=24, num_heads=7, num_kv_heads=1, block_size=32),
    Shape(head_dim=32, num_heads=8, num_kv_heads=8, normed=True),
    Shape(head_dim=64, num_heads=14, num_kv_heads=2, block_size=64),
    Shape(head_dim=64, num_heads=6, num_kv_heads=2, window=70),
    Shape(head_dim=80, num_heads=4, num_kv_heads=2, block_size=32, window=1),
    Shape(head_dim=96, num_heads=5, num_kv_heads=1, normed=True, window=300),
    Shape(head_dim=128, num_heads=8, num_kv_heads=2),
    Shape(head_dim=256, num_heads=4, num_kv_heads=1, block_size=64),
    Shape(head_dim=2, num_heads=1, num_kv_heads=1, threads=1),
    Shape(head_dim=18, num_heads=130, num_kv_heads=2, threads=3),
    Shape(head_dim=40, num_heads=6, num_kv_heads=2, softcap=1.5, window=130),
    Shape(head_dim=48, num_heads=6, num_kv_heads=6, alibi=True),
    Shape(head_dim=20, num_heads=4, num_kv_heads=2, clip=0.7),
]


class TestParity:
    @pytest.mark.parametrize("stored", STORED)
    @pytest.mark.parametrize("shape", SHAPES, ids=lambda s: f"{s.num_heads}-{s.num_kv_heads}-{s.head_dim}")
    def test_prompts_in_chunks_and_decodes_mixed(self, shape: Shape, stored: str) -> None:
        layer = Layer(replace(shape, stored=stored))
        long, short = (Fed(random_qkv(layer.shape, n, n)) for n in (420, 90))
        for step in ([(long, 300)], [(short, 33), (long, 1)], [(long, 100), (short, 1)], [(short, 5), (long, 1)]):
            layer.step(step)
        layer.step([(short, 1), (long, 1)])
        check(layer, long)
        check(layer, short)

    @pytest.mark.parametrize("group", range(1, 9))
    def test_group_sizes(self, group: int) -> None:
        layer = Layer(Shape(num_heads=2 * group, num_kv_heads=2, head_dim=32))
        fed = Fed(random_qkv(layer.shape, 150, group))
        layer.step([(fed, 149)])
        layer.step([(fed, 1)])
        check(layer, fed)

    @pytest.mark.parametrize("stored", STORED)
    def test_sixty_four_sequences_of_all_lengths(self, stored: str) -> None:
        layer = Layer(Shape(num_heads=4, num_kv_heads=2, head_dim=32, stored=stored))
        fed = [Fed(random_qkv(layer.shape, n + 1, n)) for n in range(1, 65)]
        for first in range(0, 64, 8):
            layer.step([(f, len(f.qkv) - 1) for f in fed[first : first + 8]])
        layer.step([(f, 1) for f in fed])
        for f in fed:
            check(layer, f)


def alone(shape: Shape, qkv: torch.Tensor, chunk: int) -> torch.Tensor:
    """The sequence computed on its own, `chunk` rows at a time."""
    layer, fed = Layer(shape), Fed(qkv)
    while fed.done < len(qkv):
        layer.step([(fed, min(chunk, len(qkv) - fed.done))])
    return fed.out


class TestBitIdentity:
    """A row's result never depends on chunks, company, blocks or threads."""

    @pytest.mark.parametrize("stored", STORED)
    @pytest.mark.parametrize("window", [None, 100])
    def test_chunks(self, stored: str, window: int | None) -> None:
        shape = Shape(stored=stored, window=window, num_heads=7, num_kv_heads=1, head_dim=48)
        qkv = random_qkv(shape, 330, 1)
        whole = alone(shape, qkv, 330)
        for chunk in (1, 5, 64, 257):
            assert torch.equal(whole, alone(shape, qkv, chunk)), chunk

    @pytest.mark.parametrize("stored", STORED)
    def test_threads(self, stored: str) -> None:
        """More threads split long sequences further."""
        shape = Shape(stored=stored, num_heads=4, num_kv_heads=1, head_dim=32, context=4096)
        qkv = random_qkv(shape, 2000, 2)
        outs = []
        for threads in (1, 2, 5):
            layer, fed = Layer(replace(shape, threads=threads)), Fed(qkv)
            while fed.done < 1990:
                layer.step([(fed, min(500, 1990 - fed.done))])
            for _ in range(10):
                layer.step([(fed, 1)])
            outs.append(fed.out)
        assert torch.equal(outs[0], outs[1])
        assert torch.equal(outs[0], outs[2])

    def test_company_and_block_size(self) -> None:
        shape = Shape(head_dim=80, num_heads=6, num_kv_heads=2)
        qkv = random_qkv(shape, 700, 3)
        expected = alone(shape, qkv, 100)
        for block_size in (16, 32, 64):
            layer = Layer(replace(shape, block_size=block_size))
            fed, others = Fed(qkv), [Fed(random_qkv(shape, 400, 10 + i)) for i in range(6)]
            layer.step([(o, 90) for o in others])
            while fed.done < 700:
                layer.step([(others[0], 3), (fed, min(70, 700 - fed.done)), *((o, 1) for o in others[1:])])
            assert torch.equal(fed.out, expected), block_size

    def test_shared_prefix(self) -> None:
        """Blocks written by another sequence serve as well as one's own."""
        layer = Layer(Shape())
        qkv = random_qkv(layer.shape, 400, 4)
        first, second = Fed(qkv), Fed(qkv)
        layer.step([(first, 320)])
        layer.step([(first, 80)])
        second.blocks, second.done = first.blocks[:20], 320
        layer.step([(second, 80)])
        assert torch.equal(first.rows[1], second.rows[0])

    def test_too_little_room_for_parts(self) -> None:
        """Without room to split it, a long sequence is computed whole; the result is the same."""
        shape = Shape(num_heads=4, num_kv_heads=1, head_dim=32, context=300, threads=4)
        qkv = random_qkv(shape, 300, 5)
        assert torch.equal(alone(shape, qkv, 1), alone(replace(shape, context=4096), qkv, 1))


class TestValues:
    def test_one_key_is_its_value(self) -> None:
        layer = Layer(Shape(stored="float32", window=1))
        fed = Fed(random_qkv(layer.shape, 40, 6))
        layer.step([(fed, 40)])
        values = fed.qkv[:, -2 * 64 :].view(40, 2, 1, 64).expand(-1, -1, 4, -1)
        assert torch.equal(fed.out, values.reshape(40, -1))

    @pytest.mark.parametrize("stored", STORED)
    def test_scores_far_apart(self, stored: str) -> None:
        """Weights from 1 down to nothing, and scores of thousands."""
        layer = Layer(Shape(stored=stored))
        qkv = random_qkv(layer.shape, 300, 7)
        qkv[:, : 8 * 64] *= 300
        fed = Fed(qkv)
        layer.step([(fed, 300)])
        assert torch.isfinite(fed.out).all()
        assert fed.out.abs().max() <= qkv[:, -2 * 64 :].abs().max() * 1.07

    @pytest.mark.parametrize("stored", STORED)
    @pytest.mark.parametrize("bad", [float("nan"), float("inf")])
    def test_what_is_not_finite_shows(self, stored: str, bad: float) -> None:
        """A key that is not finite reaches every row that sees it, and no other."""
        layer = Layer(Shape(stored=stored, num_heads=2, num_kv_heads=1))
        qkv = random_qkv(layer.shape, 100, 8)
        key = qkv[60, 2 * 64 : 3 * 64]
        key[:] = bad
        fed, other = Fed(qkv), Fed(random_qkv(layer.shape, 100, 9))
        layer.step([(other, 100), (fed, 100)])
        assert torch.isfinite(fed.out[:60]).all()
        assert torch.isfinite(other.out).all()
        assert torch.isnan(fed.out[60:]).all()
        layer.cache.scrub(fed.blocks)
        assert all((layer.cache.layers[0][b] == 0).all() for b in fed.blocks)
        check(layer, other)


class TestMemory:
    @pytest.mark.parametrize("stored", STORED)
    @pytest.mark.parametrize("head_dim", [24, 64, 80])
    @pytest.mark.parametrize("block_size", [16, 64])
    def test_contents_are_what_was_written(self, stored: str, head_dim: int, block_size: int) -> None:
        """Values are not rotated, so they must come back as the reference keeps them, to the bit."""
        layer = Layer(Shape(stored=stored, head_dim=head_dim, block_size=block_size, num_heads=2), num_blocks=16)
        fed = Fed(random_qkv(layer.shape, 70, 11))
        layer.step([(fed, 50)])
        for _ in range(20):
            layer.step([(fed, 1)])
        _, values = layer.cache.contents(0, fed.blocks)
        kept = FORMATS[stored]
        written = fed.qkv[:, -2 * head_dim :].view(70, 2, head_dim)
        assert torch.equal(values[:70], decode(encode(written, kept), kept, torch.float32))

    def test_sizes(self) -> None:
        config = model_config(8, 2, 64, 64)
        assert bytes_per_token(config, torch.bfloat16) == bytes_per_token(config, torch.bfloat16, native=True) == 512
        for stored, expected in {"float32": 1024, "bfloat16": 512, "fp8": 256, "int8": 272}.items():
            cache = NativeKVCache(config, 3, 16, stored=FORMATS[stored])
            assert bytes_per_token(config, FORMATS[stored], native=True) == expected
            assert cache.layers[0].shape == (4, expected * 16)
            assert cache.layers[0].data_ptr() % 64 == 0

    def test_settings_that_cannot_be(self) -> None:
        config = model_config(8, 2, 64, 64)
        with pytest.raises(ModelError, match="multiple of 16"):
            NativeKVCache(config, 3, 24, stored=FORMATS["fp8"])
        with pytest.raises(ModelError, match="no float16 cache"):
            NativeKVCache(config, 3, 16, stored=choose_format("auto", torch.float16))
        with pytest.raises(ModelError, match="choose auto or one of float32"):
            choose_format("int3", torch.float32)
        assert unsupported(config) is None
        assert "even numbers up to 256" in str(unsupported(model_config(1, 1, 258, 64)))
        assert "up to 128" in str(unsupported(model_config(129, 1, 64, 64)))
        sinks = msgspec.structs.replace(model_config(1, 1, 64, 64), sinks=True)
        assert unsupported(sinks) == "the native kernels have no attention sinks"


class TestEveryFp8Value:
    def test_native_and_reference_read_codes_alike(self) -> None:
        layer = Layer(Shape(stored="fp8", num_heads=1, num_kv_heads=1, head_dim=16, window=1), num_blocks=20)
        codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
        codes = codes[~codes.isnan()]
        values = torch.zeros(256)
        values[: len(codes)] = codes
        qkv = torch.zeros(16, 48)
        qkv[:, 32:] = values.view(16, 16)
        fed = Fed(qkv)
        layer.step([(fed, 16)])
        assert np.array_equal(fed.out.flatten().numpy(), values.numpy())

    def test_rounding_is_pytorchs(self) -> None:
        layer = Layer(Shape(stored="fp8", num_heads=1, num_kv_heads=1, head_dim=256, window=1), num_blocks=20)
        generator = torch.Generator().manual_seed(1)
        qkv = torch.zeros(100, 768)
        qkv[:, 512:] = torch.randn(100, 256, generator=generator) * 2.0 ** torch.randint(
            -14, 11, (100, 256), generator=generator
        )
        fed = Fed(qkv)
        layer.step([(fed, 100)])
        assert torch.equal(fed.out, decode(encode(qkv[:, 512:], FORMATS["fp8"]), FORMATS["fp8"], torch.float32))
