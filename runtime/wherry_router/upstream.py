"""One try of one request on one worker."""

import asyncio
from collections.abc import AsyncGenerator, Callable

import aiohttp
import msgspec

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.sse import HEADER_HEARTBEAT, decode_frame, decode_load, frames
from wherry_protocol.worker import End, ErrorEvent, Event, LoadReport, LoadUpdate, Token
from wherry_router.fault import Expired, QueueFull, WorkerFault
from wherry_router.load_feed import NoFeedError
from wherry_router.pool import Replica
from wherry_router.settings import Limits
from wherry_router.watchdog import Health, Watchdog, begins_within
from wherry_router.worker_tls import PLAIN, Secure, WorkerTls

_decode_error = msgspec.json.Decoder(ErrorEvent).decode
_decode_load = msgspec.json.Decoder(LoadReport).decode
_JSON = "application/json"
_MAX_REFUSAL = 64 * 1024
_LONGEST_PROBE_S = 30.0
_PROBE_S = 1.0  # for questions that no client waits for
_SILENCE_S = 1.5  # of a load stream, which says every 0.3 s that it is there


class Upstream:
    """Speaks the worker API over pooled connections."""

    def __init__(self, token: str | None, limits: Limits, tls: WorkerTls | None = None) -> None:
        self._limits = limits
        self._tls = tls
        self._health = Health(self._well, limits.probe_timeout_s)
        self._headers = {"content-type": _JSON} | ({"authorization": f"Bearer {token}"} if token else {})
        timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=limits.connect_timeout_s)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=15),
            timeout=timeout,
            read_bufsize=2**16,
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            headers={"accept": "text/event-stream", "user-agent": "wherry-router"},
            skip_auto_headers=("accept-encoding",),
        )

    async def close(self) -> None:
        """Closes every connection."""
        self._health.close()
        await self._session.close()

    def _secure(self) -> Secure:
        """How each connection is made; asked every time, as certificates change."""
        return PLAIN if self._tls is None else self._tls.secure()

    def _refused(self, url: str, error: Exception) -> None:
        if self._tls is not None:
            self._tls.note(url, error)

    async def _well(self, url: str) -> bool:
        return await self.ask(url, "/health", _LONGEST_PROBE_S)

    async def ask(self, url: str, path: str, timeout_s: float = _PROBE_S) -> bool:
        """Whether a GET of `path` answers 200 in time."""
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        try:
            async with self._session.get(url + path, timeout=timeout, **self._secure()) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError, TimeoutError) as error:
            self._refused(url, error)
            return False

    async def load(self, url: str) -> LoadReport | None:
        """The worker's load; None: it does not tell."""
        timeout = aiohttp.ClientTimeout(total=_PROBE_S)
        try:
            async with self._session.get(
                url + "/load", headers=self._headers, timeout=timeout, **self._secure()
            ) as response:
                return _decode_load(await response.read()) if response.status == 200 else None
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError):
            return None

    async def watch_load(self, url: str) -> AsyncGenerator[LoadUpdate, None]:
        """The worker's load whenever it has changed.

        Raises:
            NoFeedError: it does not tell.
            aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError: it told, and the stream broke.
        """
        timeout = aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_timeout_s, sock_read=_SILENCE_S)
        async with self._session.get(
            url + "/load/watch", headers=self._headers, timeout=timeout, **self._secure()
        ) as response:
            if response.status != 200:
                raise NoFeedError(f"/load/watch: {response.status}")
            async for frame in frames(response.content.iter_any()):
                update = decode_load(frame)
                if update is not None:
                    yield update

    async def execute(
        self,
        replica: Replica,
        body: bytes,
        correlation_id: str,
        deadline: float,
        leaves: Callable[[], bool] = lambda: False,
    ) -> AsyncGenerator[Event, None]:
        """The worker's events. Closing the generator cancels it.

        Args:
            deadline: for the first token, in the event loop's time.
            leaves: asked now and then; once it is true, the try ends with the fault `draining`.

        Raises:
            WorkerFault: the worker is gone, frozen, not ready, full, or does not speak the protocol.
            Expired: the deadline passed.
            ApiError: the worker refused the request itself.
        """
        url = replica.endpoint.url
        headers = {**self._headers, "x-correlation-id": correlation_id}
        limit = asyncio.timeout(None)

        def abort() -> None:
            limit.reschedule(0)

        begin_s = begins_within(self._health.timeout(url), len(body))
        health = self._health
        watchdog = Watchdog(
            self._limits.stall_s,
            begin_s,
            deadline,
            lambda: health.ask(url),
            abort,
            leaves,
            lambda: health.is_well(url),
        )
        try:
            # A timeout must not span a yield, so this one ends with the response's headers.
            async with limit:
                response = await self._session.post(replica.execute_url, data=body, headers=headers, **self._secure())
            watchdog.begun(promises=HEADER_HEARTBEAT in response.headers)
            watchdog.abort = response.close
            async with response:
                if response.status != 200:
                    raise await _refusal(response)
                async for event in _events(response, watchdog):
                    yield event
        except (aiohttp.ClientError, OSError, TimeoutError, msgspec.DecodeError) as error:
            self._refused(url, error)
            fault = _fault(error, watchdog, self._limits.first_token_timeout_s)
            if isinstance(fault, WorkerFault):
                fault.since = watchdog.heard
            raise fault from None
        finally:
            watchdog.stop()


async def _events(response: aiohttp.ClientResponse, watchdog: Watchdog) -> AsyncGenerator[Event, None]:
    ended = False
    async for frame in frames(response.content.iter_any()):
        event = decode_frame(frame)
        if event is None:
            watchdog.beat()
            continue
        watchdog.touch()
        kind = type(event)
        if kind is Token:
            watchdog.first_token()
        elif kind is End or kind is ErrorEvent:
            ended = True
        # Reading goes on to the end of the body, which gives the connection back to the pool.
        watchdog.hold()
        yield event
        watchdog.reads()
    if not ended:
        raise aiohttp.ClientPayloadError("the stream ended before the answer did")


def _fault(error: Exception, watchdog: Watchdog, seconds: float) -> Exception:
    if watchdog.expired:
        return Expired(seconds)
    if watchdog.left:
        return WorkerFault("draining", "the replica's time to drain is over")
    if watchdog.mute:
        return WorkerFault("lost", "the connection is silent though the worker is well")
    if watchdog.lost:
        return WorkerFault("frozen", "no event, and no answer to /health")
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return WorkerFault("unreachable", str(error))
    if isinstance(error, msgspec.DecodeError):
        return WorkerFault("protocol", str(error))
    return WorkerFault("lost", str(error) or type(error).__name__)


async def _refusal(response: aiohttp.ClientResponse) -> Exception:
    """What to raise for an answer other than 200."""
    status = response.status
    try:
        event = _decode_error(await response.content.read(_MAX_REFUSAL))
    except msgspec.DecodeError:
        event = ErrorEvent(code="worker_error", message=f"the worker answered {status}")
    if status == 429:
        after = response.headers.get("retry-after", "1")
        return QueueFull(ApiError(429, event.code, event.message, retry_after_s=int(after) if after.isdigit() else 1))
    if status == 401:
        # The router's own token is wrong: nothing that the client could mend.
        return WorkerFault("unauthorized", "the worker refused the router's token")
    if status >= 500:
        return WorkerFault("not_ready" if status == 503 else "worker_error", event.message)
    return ApiError(status, event.code, event.message, param=event.param)
