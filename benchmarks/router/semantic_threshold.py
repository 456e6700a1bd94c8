"""How often answers of questions that mean the same would be right and wrong, by threshold: with an embedding endpoint
and pairs of questions of your own, or with the tests' small embedding and the pairs below.

    python -m benchmarks.router.semantic_threshold [--url URL] [--model NAME] [--key-env VARIABLE] [--pairs FILE]

`--pairs`: JSON, `{"same": [[QUESTION, QUESTION], …], "other": [[QUESTION, QUESTION], …]}`; the second ones look alike
and want different answers. Numbers are compared as the router does it.
"""

import argparse
import asyncio
import os
import time
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table
from tests.router.embedding_server import embed as small

from wherry_protocol.worker import ChatMessage, ExecuteRequest, Prompt
from wherry_router.response_cache.embedding import Embedder
from wherry_router.response_cache.question import question_of
from wherry_router.response_cache.vectors import Vector, unit

THRESHOLDS = (0.7, 0.75, 0.8, 0.85, 0.9, 0.95, 0.975, 0.99)


class Pairs(msgspec.Struct, forbid_unknown_fields=True):
    """Pairs of questions that mean the same, and of others that look alike."""

    same: list[tuple[str, str]]
    other: list[tuple[str, str]]


PAIRS = Pairs(
    same=[
        ("How do I reset the password of my account?", "How can I reset my account password?"),
        ("How do I reset the password of my account?", "I forgot my password, how do I get a new one?"),
        ("Where can I download my invoice?", "where do i download an invoice"),
        ("Where can I download my invoice?", "Please tell me where my invoice can be downloaded."),
        ("How long does shipping to Norway take?", "What is the shipping time to Norway?"),
        ("How long does shipping to Norway take?", "How long does it take to ship to Norway?"),
        ("What is the capital of France?", "Tell me the capital of France"),
        ("What is the capital of France?", "Which city is France's capital?"),
        ("How do I cancel my subscription?", "Cancel my subscription: how?"),
        ("How do I cancel my subscription?", "I want to stop subscribing, what do I do?"),
        ("Can I change the delivery address after ordering?", "Can the delivery address be changed after I ordered?"),
        ("Who wrote the novel Emma?", "Who is the author of the novel Emma?"),
        ("How many planets are in the solar system?", "How many planets does the solar system have?"),
        ("Does the warranty cover water damage?", "Is water damage covered by the warranty?"),
        ("Which payment methods do you accept?", "What payment methods are accepted?"),
        ("Is the museum open on Sundays?", "is the museum open on sunday"),
    ],
    other=[
        ("How do I reset the password of my account?", "How do I change the email of my account?"),
        ("How do I reset the password of my account?", "How do I delete my account?"),
        ("Where can I download my invoice?", "Where can I download my contract?"),
        ("How long does shipping to Norway take?", "How long does shipping to Sweden take?"),
        ("How long does shipping to Norway take?", "How much does shipping to Norway cost?"),
        ("What is the capital of France?", "What is the capital of Finland?"),
        ("How do I cancel my subscription?", "How do I renew my subscription?"),
        ("Can I change the delivery address after ordering?", "Can I change the delivery address before ordering?"),
        ("Who wrote the novel Emma?", "Who wrote the novel Persuasion?"),
        ("Does the warranty cover water damage?", "Does the warranty not cover water damage?"),
        ("Is the museum open on Sundays?", "Is the museum closed on Sundays?"),
        ("Is the museum open on Sundays?", "Is the museum open on Mondays?"),
        ("What was the revenue in 2019?", "What was the revenue in 2020?"),
        ("How much is 15% of 80?", "How much is 18% of 50?"),
        ("What is new in version 1.2.3?", "What is new in version 1.2.4?"),
        ("Convert 5 miles to kilometres", "Convert 50 miles to kilometres"),
    ],
)


def comparable(one: str, other: str) -> bool:
    """Whether the router would compare them at all."""

    def group(text: str) -> bytes | None:
        prompt = Prompt(messages=[ChatMessage(role="user", content=text)])
        found = question_of(ExecuteRequest(id="", model="", prompt=prompt), "", 32_000)
        return None if found is None else found.group

    return group(one) is not None and group(one) == group(other)


async def embedded(texts: set[str], args: argparse.Namespace) -> dict[str, Vector]:
    """The vector of each text.

    Raises:
        RuntimeError: the endpoint gave none.
    """
    vectors: dict[str, Vector | None] = {}
    if args.url is None:
        vectors = {text: unit(small(text)) for text in texts}
    else:
        key = os.environ.get(args.key_env) if args.key_env else None
        embedder = Embedder(args.url, args.model, key, 30.0, time.monotonic, lambda _: None)
        vectors = {text: await embedder.embed(text) for text in sorted(texts)}
        await embedder.close()
    found = {text: vector for text, vector in vectors.items() if vector is not None}
    if len(found) < len(texts):
        raise RuntimeError(f"{len(texts) - len(found)} of {len(texts)} texts got no embedding")
    return found


def rows(pairs: Pairs, vectors: dict[str, Vector]) -> list[dict[str, float]]:
    """Shares from 0 to 1, by threshold."""

    def share(of: list[tuple[str, str]], threshold: float, numbers: bool) -> float:
        hits = [
            float(vectors[one] @ vectors[other]) >= threshold and (comparable(one, other) or not numbers)
            for one, other in of
        ]
        return sum(hits) / max(len(hits), 1)

    return [
        {
            "threshold": threshold,
            "right": share(pairs.same, threshold, True),
            "wrong": share(pairs.other, threshold, True),
            "wrong without numbers": share(pairs.other, threshold, False),
        }
        for threshold in THRESHOLDS
    ]


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="an endpoint that speaks OpenAI's /v1/embeddings")
    parser.add_argument("--model", default="")
    parser.add_argument("--key-env", help="the variable that holds its key")
    parser.add_argument("--pairs", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    pairs = msgspec.json.decode(args.pairs.read_bytes(), type=Pairs) if args.pairs else PAIRS
    texts = {text for pair in [*pairs.same, *pairs.other] for text in pair}
    found = rows(pairs, asyncio.run(embedded(texts, args)))
    table = Table(title=f"{len(pairs.same)} pairs that mean the same, {len(pairs.other)} that look alike")
    for column in ("threshold", "right hits", "wrong hits", "wrong hits, were numbers not compared"):
        table.add_column(column, justify="right")
    for row in found:
        table.add_row(f"{row['threshold']:g}", *(f"{share:.0%}" for name, share in row.items() if name != "threshold"))
    Console().print(table)
    if args.json:
        args.json.write_bytes(msgspec.json.format(msgspec.json.encode(found)))


if __name__ == "__main__":
    main()
