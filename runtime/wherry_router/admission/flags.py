"""The flags of admission."""

import argparse

from wherry_router.admission.classes import Classes, PriorityClass, parse_class
from wherry_router.admission.settings import Bounds, QueueSettings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    group = parser.add_argument_group("admission")
    defaults = QueueSettings()
    group.add_argument(
        "--priority-class",
        action="append",
        type=_class,
        default=[],
        metavar="name=NAME,priority=N[,max-queued-requests=N][,max-queued-tokens=N][,default]",
        help="a class that requests may name in x-wherry-priority; for each class one. Higher priorities go first, "
        "and pause what runs of lower ones",
    )
    group.add_argument(
        "--queue-max-requests",
        type=_count,
        default=defaults.bounds.max_requests,
        help="requests that wait here at most; over it the lowest class is refused with 429 (default: %(default)s)",
    )
    group.add_argument(
        "--queue-max-tokens",
        type=_count,
        default=defaults.bounds.max_tokens,
        help="tokens of their prompts and answers at most, estimated (default: %(default)s)",
    )
    group.add_argument(
        "--queue-timeout-s",
        type=_seconds,
        default=defaults.timeout_s,
        help="seconds that a request waits here unless it sets x-wherry-queue-timeout-ms (default: %(default)s)",
    )


def settings(args: argparse.Namespace) -> QueueSettings:
    """What the flags say; `no_replica_wait_s` is one of the router's bounds.

    Raises:
        ValueError: the classes do not go together.
    """
    Classes(args.priority_class)
    return QueueSettings(
        classes=tuple(args.priority_class),
        bounds=Bounds(
            max_requests=args.queue_max_requests,
            max_tokens=args.queue_max_tokens,
            no_replica_s=args.no_replica_wait_s,
        ),
        timeout_s=args.queue_timeout_s,
    )


def _class(text: str) -> PriorityClass:
    try:
        return parse_class(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _count(text: str) -> int:
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative")
    return value


def _seconds(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not from 0 to 3600")
    return value
