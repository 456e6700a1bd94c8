"""How byte-level BPE vocabularies split text before merging, by the names that GGUF files have for it.

The patterns are those of each family's tokenizer.json. Several are applied one after the other, each to what the ones
before it left whole.
"""

import difflib
from typing import Any, NamedTuple

from wherry_runtime.loading.errors import ModelError

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_SYMBOLS_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_SYMBOLS_AND_SPACES}"
_QWEN2 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_SYMBOLS_AND_SPACES}"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_WORDS = rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+%s|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*%s"
_SLASHES_AND_SPACES = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = _WORDS % ("", "") + rf"|\p{{N}}|{_SLASHES_AND_SPACES}"
_GPT4O = _WORDS % (f"{_CONTRACTIONS}?", f"{_CONTRACTIONS}?") + rf"|\p{{N}}{{1,3}}|{_SLASHES_AND_SPACES}"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}",
    "[一-龥\u3040-ゟ゠-ヿ]+",
    (
        r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
)
_DEFAULT = (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")
_BLOOM = r" ?[^(\s|[.,!?…。，、।۔،])]+"
_FALCON = (r"[\p{P}\$\+<=>\^~\|`]+", _GPT2, "[0-9][0-9][0-9]")


class PreTokenizer(NamedTuple):
    """A way to split.

    Attributes:
        whole_words: a word that is a token is one, whatever the merges say.
        add_bos: the sequence begins with BOS where the file does not say.
    """

    patterns: tuple[str, ...]
    whole_words: bool = False
    add_bos: bool = False


_DIGITS = PreTokenizer((r"\p{N}", _GPT2))
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "llama-bpe": PreTokenizer((_LLAMA3,), whole_words=True, add_bos=True),
    "qwen2": PreTokenizer((_QWEN2,)),
    "default": PreTokenizer(_DEFAULT),
    "smaug-bpe": PreTokenizer((_LLAMA3,)),
    "starcoder": _DIGITS,
    "tekken": PreTokenizer((_TEKKEN,), whole_words=True, add_bos=True),
    "gpt-4o": PreTokenizer((_GPT4O,)),
    "deepseek-v3": PreTokenizer(_DEEPSEEK_V3),
    "falcon": PreTokenizer(_FALCON),
    "bloom": PreTokenizer((_BLOOM,)),
}
_ALIASES = {
    "gpt-2": ("phi-2", "olmo", "mpt", "jais", "trillion", "modern-bert", "mellum"),
    "llama-bpe": ("llama3", "llama-v3", "falcon3", "pixtral", "lfm2"),
    "qwen2": ("deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan"),
    "smaug-bpe": ("dbrx", "chatglm-bpe", "glm4"),
    "starcoder": ("refact", "command-r", "smollm", "codeshell", "exaone"),
    "gpt-4o": ("llama4",),
    "bloom": ("poro-chat", "gpt3-finnish"),
}
_BY_NAME = PRE_TOKENIZERS | {alias: PRE_TOKENIZERS[name] for name, names in _ALIASES.items() for alias in names}


def pre_tokenizer(name: str) -> PreTokenizer:
    """The one that GGUF files call `name`.

    Raises:
        ModelError: unknown_pre_tokenizer, with those that are known and the nearest.
    """
    if (known := _BY_NAME.get(name)) is not None:
        return known
    near = difflib.get_close_matches(name, _BY_NAME, n=1)
    hint = f"; the nearest is {near[0]}" if near else ""
    raise ModelError(
        "unknown_pre_tokenizer", f"pre-tokenizer {name!r} is not known. Known: {', '.join(sorted(_BY_NAME))}{hint}"
    )


def as_json(pre: PreTokenizer) -> dict[str, Any]:
    """The `pre_tokenizer` of a tokenizer.json."""
    splits: list[dict[str, Any]] = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in pre.patterns
    ]
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    return {"type": "Sequence", "pretokenizers": [*splits, level]}


def name_of(description: dict[str, Any] | None, whole_words: bool) -> str:
    """What GGUF files call the `pre_tokenizer` of a tokenizer.json.

    Raises:
        ModelError: unknown_pre_tokenizer.
    """
    steps = (description or {}).get("pretokenizers") or [description or {}]
    patterns: list[str | None] = []
    for step in steps:
        if step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            patterns += [_GPT2] if step.get("use_regex", True) else []
        elif step.get("type") == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
            patterns.append((step.get("pattern") or {}).get("Regex"))
        elif step.get("type") == "Digits" and step.get("individual_digits"):
            patterns.append(r"\p{N}")
        else:
            patterns.append(None)
    # What no pattern matches stays as it is, so GPT-2's last alternative may be there or not.
    found = [(p or "").removesuffix(r"|\s+") for p in patterns]
    for name, pre in PRE_TOKENIZERS.items():
        if [p.removesuffix(r"|\s+") for p in pre.patterns] == found and pre.whole_words == whole_words:
            return name
    raise ModelError(
        "unknown_pre_tokenizer",
        f"GGUF has no name that is known here for a tokenizer that splits text by {patterns}",
    )
