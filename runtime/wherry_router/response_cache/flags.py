"""The router's flags about the response cache."""

import argparse
import os
import time
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from typing import TYPE_CHECKING

from wherry_protocol.naming import ENV_CACHE_REDIS_URL, ENV_EMBEDDING_KEY, ENV_WORKER_TOKEN
from wherry_router import redis_url
from wherry_router.response_cache.cache import ResponseCache
from wherry_router.response_cache.memory import Memory, Store
from wherry_router.response_cache.metrics import CacheMetrics

if TYPE_CHECKING:
    from wherry_router.response_cache.semantic import Semantic
    from wherry_router.response_cache.shared import RedisStore

DEFAULT_TTL_S = 600.0
_LEAST_BYTES = 1 << 20
_LARGEST_SHARE = 100  # no answer takes more than this part of the whole


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("response cache")
    group.add_argument(
        "--response-cache-bytes",
        type=_size,
        default=0,
        help="memory for answers that are the same each time (temperature 0 or a seed), here or, with "
        f"${ENV_CACHE_REDIS_URL}, in Redis; 0: none is kept (default)",
    )
    group.add_argument(
        "--response-cache-ttl-s", type=float, default=DEFAULT_TTL_S, help="seconds that they are kept (%(default)g)"
    )
    group.add_argument(
        "--response-cache-version", default="", help="of what answers; answers of another version are not found"
    )
    group.add_argument(
        "--response-cache-namespace", help="begins the names of keys in Redis (default: the model's name)"
    )
    group.add_argument(
        "--embedding-url",
        help="finds answers by what a question means, too: a URL that speaks OpenAI's /v1/embeddings; its key is "
        f"${ENV_EMBEDDING_KEY}",
    )
    group.add_argument("--embedding-model", default="", help="the model to name there")
    group.add_argument(
        "--embedding-timeout-s", type=float, default=0.2, help="seconds that a request waits for it (%(default)g)"
    )
    group.add_argument(
        "--similarity-threshold",
        type=_cosine,
        default=0.95,
        help="cosine of two questions' vectors from which on one's answer is given to the other (%(default)g)",
    )
    group.add_argument(
        "--similarity-questions", type=int, default=2000, help="questions that are known at a time (%(default)s)"
    )
    group.add_argument(
        "--similarity-max-chars", type=int, default=1000, help="longer questions are not compared (%(default)s)"
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where settings cannot be."""
    redis_url.check(parser, ENV_CACHE_REDIS_URL)
    if args.embedding_url is None:
        return
    if not args.embedding_url.startswith(("http://", "https://")):
        parser.error("--embedding-url must begin with http:// or https://")
    if not args.response_cache_bytes:
        parser.error("--embedding-url needs --response-cache-bytes: there is no answer to find")
    if min(args.embedding_timeout_s, args.similarity_questions, args.similarity_max_chars) <= 0:
        parser.error("--embedding-timeout-s, --similarity-questions and --similarity-max-chars must be above 0")


def make(
    args: argparse.Namespace, metrics: CacheMetrics, stack: AsyncExitStack
) -> tuple[ResponseCache | None, list[Coroutine[None, None, None]]]:
    """The cache that the flags and the environment ask for, if any, and what has to run beside the requests; none of
    that ends. `stack` closes it."""
    if not args.response_cache_bytes:
        return None, []
    store, shared, followers = _store(args, metrics, stack)
    semantic = None
    if args.embedding_url is not None:
        semantic, more = _semantic(args, metrics, stack, shared)
        followers += more
    metrics.bytes.set_function(lambda: store.used)
    largest = args.response_cache_bytes // _LARGEST_SHARE
    return ResponseCache(store, largest, args.response_cache_version, semantic), followers


def _store(
    args: argparse.Namespace, metrics: CacheMetrics, stack: AsyncExitStack
) -> tuple[Store, "RedisStore | None", list[Coroutine[None, None, None]]]:
    url = os.environ.get(ENV_CACHE_REDIS_URL)
    if not url:
        return Memory(args.response_cache_bytes, args.response_cache_ttl_s, time.monotonic), None, []
    from wherry_router.response_cache.seal import Seal
    from wherry_router.response_cache.shared import RedisStore

    shared = RedisStore(
        url,
        f"wherry:answers:{args.response_cache_namespace or args.model}",
        args.response_cache_bytes,
        args.response_cache_ttl_s,
        Seal(os.environ.get(ENV_WORKER_TOKEN)),
        time.monotonic,
    )
    stack.push_async_callback(shared.close)
    metrics.up.labels("redis").set_function(lambda: float(not shared.lost))
    return shared, shared, [shared.run()]


def _semantic(
    args: argparse.Namespace, metrics: CacheMetrics, stack: AsyncExitStack, shared: "RedisStore | None"
) -> tuple["Semantic", list[Coroutine[None, None, None]]]:
    # One thread: what is multiplied here takes less than others need to wake up.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Imported late: NumPy takes a tenth of a second and 30 MB.
    from wherry_router.response_cache.embedding import Embedder
    from wherry_router.response_cache.semantic import Semantic, SemanticSettings

    embedder = Embedder(
        args.embedding_url,
        args.embedding_model,
        os.environ.get(ENV_EMBEDDING_KEY),
        args.embedding_timeout_s,
        time.monotonic,
        lambda result: metrics.embeddings.labels(result).inc(),
    )
    settings = SemanticSettings(
        space=f"{args.embedding_url}\0{args.embedding_model}",
        threshold=args.similarity_threshold,
        most=args.similarity_questions,
        max_chars=args.similarity_max_chars,
        ttl_s=args.response_cache_ttl_s,
    )
    semantic = Semantic(settings, embedder, time.monotonic, shared)
    stack.push_async_callback(embedder.close)
    stack.push_async_callback(semantic.close)
    metrics.up.labels("embedding").set_function(lambda: float(not embedder.lost))
    metrics.questions.set_function(lambda: len(semantic.vectors))
    followers = [embedder.run()]
    if shared is not None:
        followers.append(semantic.follow(shared))
    return semantic, followers


def _cosine(text: str) -> float:
    value = float(text)
    if not 0.5 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not from 0.5 to 1")
    return value


def _size(text: str) -> int:
    value = int(text)
    if value != 0 and value < _LEAST_BYTES:
        raise argparse.ArgumentTypeError(f"{text} bytes are too few to be of use: give {_LEAST_BYTES} or more, or 0")
    return value
