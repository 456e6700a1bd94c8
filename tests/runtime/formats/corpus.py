"""Text that tokenizers disagree on: made here, the same every time."""

import random

_SAMPLES = (
    "The quick brown fox doesn't jump; they'll say it's we've I'M I'd You'RE. ",
    "def f(x: int) -> list[str]:\n    return [f'{i:>3}' for i in range(x)]  # naïve\n\n\n",
    '#include <stdio.h>\r\nint main(void) {\r\n\tprintf("%d\\n", 1 << 31);\r\n}\r\n',
    "東京都は日本の首都。你好，世界！한국어 텍스트도 있습니다. ประเทศไทย ",
    "Привет, мир! Γειά σου Κόσμε مرحبا بالعالم שלום עולם नमस्ते दुनिया ",
    "👩‍👩‍👧‍👦🇩🇪🏳️‍🌈 ✈️ 😀😃 e\u0301 é ﬁ Å Å ½ ² ℌ ",
    "1 12 123 1234 12345 1,234.56 0x7fff 1e-9 ٣٤٥ ४५६ Ⅷ ",
    "    four\tspaces  and   runs    of     them      ",
    " \u00a0\u2003\u200b\u3000\ufeff ",
    "\x00\x01\x07\x08\x1b[0m\x7f\x85\u2028\u2029",
    "https://example.org/a_b?c=d&e=%20#f $100 50% a@b.c --flag=value ~/.x ",
    "<s></s><unk><|im_start|>user\n<|im_end|><|endoftext|>[INST]",
    "▁▁▁ ▁a ▁ <0x0A> Ġ Ċ âĢĻ",
    "ALLCAPS camelCase snake_case kebab-case UPPER_SNAKE Mixed123Case ",
)


def corpus(size: int, seed: int = 0, wild: float = 0.3) -> list[str]:
    """Texts of `size` characters together: the samples, then cut and shuffled, with any characters between (`wild`)."""
    rng = random.Random(seed)
    texts, total = list(_SAMPLES), sum(map(len, _SAMPLES))
    while total < size:
        parts = []
        for _ in range(rng.randrange(1, 8)):
            sample = rng.choice(_SAMPLES)
            start = rng.randrange(len(sample))
            parts.append(sample[start : start + rng.randrange(1, 60)])
            if rng.random() < wild:
                parts.append("".join(map(chr, _characters(rng, rng.randrange(1, 12)))))
        texts.append("".join(parts))
        total += len(texts[-1])
    return texts


def _characters(rng: random.Random, count: int) -> list[int]:
    found = []
    while len(found) < count:
        code = rng.randrange(rng.choice((0x80, 0x800, 0x3000, 0x10000, 0x20000)))
        if not 0xD800 <= code < 0xE000:
            found.append(code)
    return found
