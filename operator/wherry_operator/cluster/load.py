"""Asks workers for their load: GET /load, all at once, in bounded time."""

import asyncio
import ipaddress
from collections.abc import Sequence

import aiohttp
import msgspec

from wherry_operator.autoscaling.decide import Signal
from wherry_operator.planning.pods import PodView
from wherry_protocol import naming
from wherry_protocol.worker import LoadReport

TIMEOUT_S = 2.0
MAX_BYTES = 65536
MAX_AT_ONCE = 64

_decoder = msgspec.json.Decoder(LoadReport)


async def poll(pods: Sequence[PodView], token: str | None) -> list[Signal | None]:
    """One signal for every pod, in order; None where a worker does not answer as it should."""
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limit = asyncio.Semaphore(MAX_AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:
        return list(await asyncio.gather(*(_one(session, limit, pod.ip) for pod in pods)))


async def _one(session: aiohttp.ClientSession, limit: asyncio.Semaphore, address: str) -> Signal | None:
    try:
        ip = ipaddress.ip_address(address)
        host = f"[{ip}]" if ip.version == 6 else str(ip)
        url = f"http://{host}:{naming.WORKER_PORT}/load"
        async with limit, session.get(url, allow_redirects=False) as response:
            if response.status != 200:
                return None
            report = _decoder.decode(await response.content.read(MAX_BYTES))
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, msgspec.MsgspecError):
        return None
    share = report.kv_tokens_used / report.kv_tokens_total if report.kv_tokens_total else 0.0
    return Signal(report.running + report.waiting, share)
