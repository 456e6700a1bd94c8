"""Asks routers which replicas they know."""

from collections.abc import Sequence

import msgspec

from wherry_operator.cluster.asking import ask
from wherry_operator.planning.pods import PodView
from wherry_protocol import naming
from wherry_protocol.router_report import PATH, RouterReport

MAX_BYTES = 1 << 20

_decoder = msgspec.json.Decoder(RouterReport)


async def poll(pods: Sequence[PodView], token: str | None) -> dict[str, RouterReport]:
    """What the routers in `pods` say, by the pod's uid; those that do not answer as they should are left out."""
    reports = await ask(pods, naming.ROUTER_PORT, PATH, token, _decoder, MAX_BYTES)
    return {pod.uid: report for pod, report in zip(pods, reports, strict=True) if report is not None}
