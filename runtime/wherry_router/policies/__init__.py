"""How a replica is chosen for a request: one policy a file, each a decision over what the candidates look like now."""

import argparse
from collections.abc import Callable

from wherry_router.policies.base import ANYTHING, Ask, Candidate, Choice, Policy
from wherry_router.policies.least_requests import LeastRequests
from wherry_router.policies.least_tokens import LeastTokens
from wherry_router.policies.power_of_two import PowerOfTwo
from wherry_router.policies.prefix_aware import PrefixAware
from wherry_router.policies.random import RandomChoice
from wherry_router.policies.round_robin import RoundRobin
from wherry_router.policies.session_affinity import SessionAffinity

__all__ = ["ANYTHING", "DEFAULT", "POLICIES", "Ask", "Candidate", "Choice", "Policy", "add_arguments"]

# By the names of --policy and of spec.router.policy.
POLICIES: dict[str, Callable[[], Policy]] = {
    "prefix-aware": PrefixAware,
    "least-tokens": LeastTokens,
    "least-requests": LeastRequests,
    "power-of-two": PowerOfTwo,
    "session-affinity": SessionAffinity,
    "round-robin": RoundRobin,
    "random": RandomChoice,
}
DEFAULT = "prefix-aware"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flag that names the policy."""
    parser.add_argument(
        "--policy",
        choices=POLICIES,
        default=DEFAULT,
        help="how a replica is chosen for a request (default: %(default)s)",
    )
