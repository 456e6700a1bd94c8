"""Asks routers which replicas they know: GET /internal/replicas, all at once, in bounded time."""

import asyncio
import ipaddress
from collections.abc import Sequence

import aiohttp
import msgspec

from wherry_operator.planning.pods import PodView
from wherry_protocol import naming
from wherry_protocol.router_report import PATH, RouterReport

TIMEOUT_S = 2.0
MAX_BYTES = 1 << 20
MAX_AT_ONCE = 64

_decoder = msgspec.json.Decoder(RouterReport)


async def poll(pods: Sequence[PodView], token: str | None) -> dict[str, RouterReport]:
    """What the routers in `pods` say, by the pod's uid; those that do not answer as they should are left out."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limit = asyncio.Semaphore(MAX_AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
        answers = await asyncio.gather(*(_one(session, limit, pod.ip) for pod in pods))
    return {pod.uid: report for pod, report in zip(pods, answers, strict=True) if report is not None}


async def _one(session: aiohttp.ClientSession, limit: asyncio.Semaphore, address: str) -> RouterReport | None:
    try:
        ip = ipaddress.ip_address(address)
        host = f"[{ip}]" if ip.version == 6 else str(ip)
        url = f"http://{host}:{naming.ROUTER_PORT}{PATH}"
        async with limit, session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                return None
            return _decoder.decode(await _body(response))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, msgspec.MsgspecError):
        return None


async def _body(response: aiohttp.ClientResponse) -> bytes:
    """The whole body.

    Raises:
        ValueError: it is larger than any router's report.
    """
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > MAX_BYTES:
            raise ValueError("the answer is too large")
        parts.append(part)
    return b"".join(parts)
