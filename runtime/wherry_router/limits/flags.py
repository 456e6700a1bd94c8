"""The router's flags about limits."""

import argparse
import os

from prometheus_client import CollectorRegistry

from wherry_protocol.naming import ENV_REDIS_URL
from wherry_router.caller import UNLIMITED, LimitSet
from wherry_router.limits.bounds import Rules
from wherry_router.limits.limiter import Limiter
from wherry_router.limits.local import LocalStore

_FIELDS = {"requests": "requests_per_minute", "tokens": "tokens_per_minute", "concurrent": "concurrent"}


def parse_limits(text: str) -> LimitSet:
    """`requests=60,tokens=100000,concurrent=8`; what is left out has no limit.

    Raises:
        argparse.ArgumentTypeError: it is something else.
    """
    given: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = part.strip().partition("=")
        if name not in _FIELDS or not number.isdecimal() or _FIELDS[name] in given:
            raise argparse.ArgumentTypeError(
                f"{text!r} is not like requests=60,tokens=100000,concurrent=8 (per minute)"
            )
        given[_FIELDS[name]] = int(number)
    try:
        return LimitSet(**given)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Every flag of this module."""
    like = "like requests=60,tokens=100000,concurrent=8: requests and tokens per minute, requests at a time"
    parser.add_argument("--limit-key", type=parse_limits, default=UNLIMITED, help=f"of each API key or token; {like}")
    parser.add_argument(
        "--limit-tenant", type=parse_limits, default=UNLIMITED, help="of each tenant, all its keys together"
    )
    parser.add_argument("--limit-total", type=parse_limits, default=UNLIMITED, help="of all requests together")
    parser.add_argument(
        "--limit-routers",
        type=_count,
        default=1,
        help="routers that count for themselves, each its part of every limit (default: %(default)s)",
    )
    parser.add_argument(
        "--limit-fallback",
        choices=("local", "open", "closed"),
        default="local",
        help=f"while Redis (${ENV_REDIS_URL}) is lost: each router its part of the limits, no limits, or no requests",
    )
    parser.add_argument("--limit-namespace", help="begins the names of keys in Redis (default: the model's name)")


def _count(text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= 1000:
        raise argparse.ArgumentTypeError(f"{text} is not a number from 1 to 1000")
    return int(text)


def make_limiter(args: argparse.Namespace, registry: CollectorRegistry) -> Limiter:
    """The limiter that the flags and $WHERRY_REDIS_URL ask for."""
    rules = Rules(per_key=args.limit_key, per_tenant=args.limit_tenant, total=args.limit_total)
    local, shared = LocalStore(args.limit_routers), None
    if url := os.environ.get(ENV_REDIS_URL):
        from wherry_router.limits.shared import SharedStore

        namespace = args.limit_namespace or args.model
        shared = SharedStore(url, f"wherry:{namespace}", args.limit_fallback, local)
    return Limiter(registry, args.model, rules, local, shared)
