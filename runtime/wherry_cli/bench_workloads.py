"""What requests ask: conversations of one or more turns, made up by seed or read from files. Pure.

A made-up word is three letters and a space: one token of most tokenizers, and of a simulated engine's. Servers count
for themselves, so lengths are what is aimed at, and the report has what was counted.
"""

import json
import random
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, count
from pathlib import Path
from typing import Any, Literal

import msgspec

from wherry_cli.bench_arrivals import Record

Kind = Literal["random", "shared-prefix", "multi-turn", "file"]
TRACE_BLOCK = 512  # tokens of a block in Mooncake's traces
_TEXT = (
    "the and for you not are but had has was all any can her one our out day get him his how man new now old see two "
    "way who boy did its let put say she too use air arm art bad bed big box buy car cat cup cut dog dry ear eat egg "
    "end eye far few fly fun"
)
_WORDS = _TEXT.split()


class PromptsError(Exception):
    """A file of prompts cannot be used. The message says where and why."""


class Turn(msgspec.Struct, frozen=True):
    """One request of a conversation: what is added to it, and `think_s` between the answer before and this."""

    text: str
    output_tokens: int
    think_s: float = 0.0


class Conversation(msgspec.Struct, frozen=True):
    """Turns that follow one another, after `before`: messages as (role, content)."""

    turns: list[Turn]
    before: list[tuple[str, str]] = []


class Lengths(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens of made-up requests. A length is drawn evenly from `1 - spread` to `1 + spread` times what it says."""

    input_tokens: int = 512
    output_tokens: int = 128
    spread: float = 0.0
    prefixes: int = 8
    prefix_tokens: int = 2048
    prefix_skew: float = 0.0  # the n-th prefix is n^-skew times as popular as the first
    turns: int = 5
    think_s: float = 1.0  # mean, exponentially distributed


def words(rng: random.Random, tokens: int) -> str:
    """Text of about so many tokens."""
    return " ".join(rng.choices(_WORDS, k=max(tokens, 1)))


def _rng(*parts: object) -> random.Random:
    return random.Random(" ".join(map(str, parts)))  # noqa: S311 - repeatable on purpose


def made_up(kind: Kind, lengths: Lengths, seed: int) -> Iterator[Conversation]:
    """Conversations without end; the n-th depends on the seed and n alone.

    Args:
        kind: `random`: nothing in common; `shared-prefix`: one request each, after one of `prefixes` system prompts;
            `multi-turn`: such conversations of `turns` requests.
    """
    prefixes = (
        []
        if kind == "random"
        else [words(_rng("prefix", seed, n), lengths.prefix_tokens) for n in range(lengths.prefixes)]
    )
    popular = list(accumulate((number + 1) ** -lengths.prefix_skew for number in range(len(prefixes))))
    for number in count():
        rng = _rng("conversation", seed, number)
        before = [("system", rng.choices(prefixes, cum_weights=popular)[0])] if prefixes else []
        turns = lengths.turns if kind == "multi-turn" else 1
        yield Conversation([_turn(rng, lengths, later=turn > 0) for turn in range(turns)], before)


def _turn(rng: random.Random, lengths: Lengths, *, later: bool) -> Turn:
    def length(tokens: int) -> int:
        return max(1, round(tokens * rng.uniform(1 - lengths.spread, 1 + lengths.spread)))

    text, output = words(rng, length(lengths.input_tokens)), length(lengths.output_tokens)
    think = rng.expovariate(1 / lengths.think_s) if later and lengths.think_s else 0.0
    return Turn(text, output, think)


def of_trace(records: Iterable[Record], seed: int) -> Iterator[Conversation]:
    """A request for each record. Equal blocks have equal text; the rest of a prompt is its own."""
    for number, record in enumerate(records):
        rng = _rng("record", seed, number)
        shared = [words(_rng("block", seed, block), TRACE_BLOCK) for block in record.blocks]
        left = record.input_tokens - TRACE_BLOCK * len(shared)
        if left < 0 and shared:  # the last block is not full
            shared[-1] = " ".join(shared[-1].split(" ")[: TRACE_BLOCK + left])
        own = [words(rng, left)] if left > 0 else []
        yield Conversation([Turn(" ".join([*shared, *own]), record.output_tokens)])


def of_file(path: Path, output_tokens: int) -> list[Conversation]:
    """A conversation for each line: text, or JSON with `prompt` or `messages` and maybe `output_tokens`.

    Raises:
        PromptsError: it cannot be read, or has a line that is neither.
    """
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptsError(f"cannot read the prompts in {path}: {error}") from None
    found = [_prompt(path, n, line, output_tokens) for n, line in enumerate(lines, 1) if line.strip()]
    if not found:
        raise PromptsError(f"{path} has no prompts")
    return found


def _prompt(path: Path, number: int, line: str, output_tokens: int) -> Conversation:
    if not line.startswith("{"):
        return Conversation([Turn(line, output_tokens)])
    try:
        row: dict[str, Any] = json.loads(line)
        tokens = int(row.get("output_tokens", output_tokens))
        if tokens < 1:
            raise ValueError("output_tokens is not positive")  # noqa: TRY301 - told like all others
        if "messages" not in row:
            return Conversation([Turn(str(row["prompt"]), tokens)])
        messages = [(str(message["role"]), str(message["content"])) for message in row["messages"]]
        (role, last), before = messages[-1], messages[:-1]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        reason = f"it lacks {error}" if isinstance(error, KeyError) else str(error)
        raise PromptsError(f"{path}, line {number}: {reason}; give text, or JSON with prompt or messages") from None
    if role != "user":
        raise PromptsError(f"{path}, line {number}: the last message has to be the user's")
    return Conversation([Turn(last, tokens)], before)


def round_robin(conversations: Sequence[Conversation]) -> Iterator[Conversation]:
    """All of them, again and again."""
    while True:
        yield from conversations


def bounded(conversations: Iterable[Conversation], requests: int | None) -> Iterator[Conversation]:
    """As many as make `requests` requests, the last one cut short; None: all."""
    for conversation in conversations:
        if requests is None:
            yield conversation
            continue
        if requests <= 0:
            return
        yield msgspec.structs.replace(conversation, turns=conversation.turns[:requests])
        requests -= len(conversation.turns)
        if requests <= 0:
            return
