"""Asks many pods the same: GET, all at once, in bounded time and with bounded answers."""

import asyncio
import ipaddress
from collections.abc import Sequence
from typing import TypeVar

import aiohttp
import msgspec

from wherry_operator.planning.pods import PodView
from wherry_operator.planning.types import WorkerClient

TIMEOUT_S = 2.0
MAX_AT_ONCE = 64

T = TypeVar("T")


def url_of(address: str, port: int, path: str, *, tls: bool = False) -> str:
    """Where a pod answers.

    Raises:
        ValueError: the address is none.
    """
    ip = ipaddress.ip_address(address)
    host = f"[{ip}]" if ip.version == 6 else str(ip)
    return f"{'https' if tls else 'http'}://{host}:{port}{path}"


async def ask(
    pods: Sequence[PodView],
    port: int,
    path: str,
    token: str | None,
    decoder: msgspec.json.Decoder[T],
    max_bytes: int,
    workers: WorkerClient | None = None,
) -> list[T | None]:
    """Each pod's answer, in order; None where it does not answer as it should.

    Routers' certificates are not checked: they name a Service, and pods are asked by the addresses that the API server
    told. Workers with mutual TLS are, and are asked as `workers` says; without it they are not asked.
    """
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    limit = asyncio.Semaphore(MAX_AT_ONCE)
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(timeout=timeout, headers=headers) as session:

        async def one(pod: PodView) -> T | None:
            try:
                if pod.mutual_tls and workers is None:
                    return None
                url = url_of(pod.ip, port, path, tls=pod.tls or pod.mutual_tls)
                context = workers.context if workers and pod.mutual_tls else False
                name = workers.server_name if workers and pod.mutual_tls else None
                async with (
                    limit,
                    session.get(url, allow_redirects=False, ssl=context, server_hostname=name) as response,
                ):
                    return decoder.decode(await _body(response, max_bytes)) if response.status == 200 else None
            except (aiohttp.ClientError, TimeoutError, OSError, ValueError, msgspec.MsgspecError):
                return None

        return list(await asyncio.gather(*(one(pod) for pod in pods)))


async def _body(response: aiohttp.ClientResponse, max_bytes: int) -> bytes:
    """The whole body.

    Raises:
        ValueError: it is larger than it may be.
    """
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > max_bytes:
            raise ValueError("the answer is too large")
        parts.append(part)
    return b"".join(parts)
