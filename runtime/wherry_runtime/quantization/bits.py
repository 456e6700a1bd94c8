"""Codes of a few bits, one right after another in 32-bit words, the lowest bits first."""

import torch

from wherry_runtime.quantization.tensors import split

WORD = 32


def pack_bits(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """[R, C] of whole numbers below 2^bits → [R, ⌈C · bits / 32⌉] int32; codes may lie across two words."""
    rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % WORD))
    # 32 codes fill `bits` words, whatever the bits are.
    places = torch.arange(WORD) * bits
    words = torch.zeros(rows, padded.shape[1] // WORD, bits, dtype=torch.int64)
    grouped = split(padded.to(torch.int64), 1, (-1, WORD))
    for i, place in enumerate(places.tolist()):
        shifted = grouped[..., i] << place % WORD
        words[..., place // WORD] |= shifted & 0xFFFFFFFF
        if place % WORD + bits > WORD:
            words[..., place // WORD + 1] |= shifted >> WORD
    needed = -(-count * bits // WORD)
    return _signed(words.flatten(1)[:, :needed])


def unpack_bits(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Undoes `pack_bits`: [R, count] uint8.

    Raises:
        ValueError: there are not as many words as that takes.
    """
    needed = -(-count * bits // WORD)
    if words.dtype is not torch.int32 or words.shape[1] != needed:
        raise ValueError(
            f"{count} codes of {bits} bits are {needed} words of int32, not {words.dtype} {words.shape[1]}"
        )
    wide = torch.nn.functional.pad(words.to(torch.int64) & 0xFFFFFFFF, (0, -needed % bits))
    grouped = split(wide, 1, (-1, bits))
    codes = torch.empty(words.shape[0], grouped.shape[1], WORD, dtype=torch.uint8)
    for i in range(WORD):
        word, shift = divmod(i * bits, WORD)
        value = grouped[..., word] >> shift
        if shift + bits > WORD:
            value = value | grouped[..., word + 1] << (WORD - shift)
        codes[..., i] = (value & ((1 << bits) - 1)).to(torch.uint8)
    return codes.flatten(1)[:, :count]


def _signed(words: torch.Tensor) -> torch.Tensor:
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32).contiguous()
