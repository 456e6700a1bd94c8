"""A fixed list of workers, asked every second whether they are ready and serve the model."""

import asyncio
import logging
from urllib.parse import urlsplit

from wherry_router.pool import Endpoint, Pool
from wherry_router.upstream import Upstream

log = logging.getLogger("wherry.router.discovery")

_EVERY_S = 1.0


def parse_endpoints(text: str) -> list[Endpoint]:
    """`http://host:port,…` or `https://host:port,…` as endpoints.

    Raises:
        ValueError: one is not such a URL.
    """
    urls = [part.strip().rstrip("/") for part in text.split(",") if part.strip()]
    for url in urls:
        parts = urlsplit(url)
        if (
            parts.scheme not in ("http", "https")
            or not parts.hostname
            or parts.port is None
            or parts.path
            or parts.query
        ):
            raise ValueError(f"{url!r} is not of the form http://host:port or https://host:port")
    if not urls:
        raise ValueError("no endpoint is given")
    return [Endpoint(name=url, url=url) for url in dict.fromkeys(urls)]


class EndpointPoll:
    """Keeps `pool` equal to those of `endpoints` that are ready and serve `model`, for ever."""

    def __init__(self, endpoints: list[Endpoint], model: str, upstream: Upstream, pool: Pool) -> None:
        self._endpoints = endpoints
        self._model = model
        self._upstream = upstream
        self._pool = pool
        self._said: dict[Endpoint, str] = {}

    async def run(self) -> None:
        """Polls."""
        current: list[Endpoint] | None = None
        while True:
            answers = await asyncio.gather(*(self._usable(endpoint) for endpoint in self._endpoints))
            usable = [endpoint for endpoint, ok in zip(self._endpoints, answers, strict=True) if ok]
            if usable != current:
                current = usable
                log.info("replicas", extra={"fields": {"routable": [endpoint.name for endpoint in usable]}})
                self._pool.set_endpoints(usable)
            await asyncio.sleep(_EVERY_S)

    async def _usable(self, endpoint: Endpoint) -> bool:
        if not await self._upstream.ask(endpoint.url, "/ready"):
            return False
        load = await self._upstream.load(endpoint.url)
        problem = ""
        if load is None:
            problem = "its /load gives no report; is the worker token the same?"
        elif load.model != self._model:
            problem = f"it serves {load.model!r}, not {self._model!r}"
        if problem and self._said.get(endpoint) != problem:
            log.warning("endpoint left out", extra={"fields": {"endpoint": endpoint.url, "problem": problem}})
        self._said[endpoint] = problem
        return not problem
