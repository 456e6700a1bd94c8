"""One try of one request on one worker."""

from collections.abc import AsyncGenerator, Callable, Iterator

import aiohttp
import msgspec

from wherry_protocol.openai.errors import ApiError
from wherry_protocol.sse import HEADER_HEARTBEAT, Frames, decode_frame, decode_load
from wherry_protocol.worker import Embedding, End, ErrorEvent, Event, LoadReport, LoadUpdate, Token
from wherry_router.connections import KEPT_S, Broken, Connections, Exchange, Unreachable
from wherry_router.fault import Expired, QueueFull, WorkerFault
from wherry_router.load_feed import NoFeedError
from wherry_router.pool import Replica
from wherry_router.settings import Limits
from wherry_router.watchdog import Health, Watchdog, begins_within
from wherry_router.worker_tls import PLAIN, Secure, WorkerTls

_decode_error = msgspec.json.Decoder(ErrorEvent).decode
_decode_load = msgspec.json.Decoder(LoadReport).decode
_PULSE = HEADER_HEARTBEAT.encode()
_MAX_REFUSAL = 64 * 1024
_LONGEST_PROBE_S = 30.0
_PROBE_S = 1.0  # for questions that no client waits for
_SILENCE_S = 1.5  # of a load stream, which says every 0.3 s that it is there


class Upstream:
    """Speaks the worker API: requests over connections of its own, questions that no client waits for with aiohttp."""

    def __init__(self, token: str | None, limits: Limits, tls: WorkerTls | None = None) -> None:
        self._limits = limits
        self._tls = tls
        self._health = Health(self._well, limits.probe_timeout_s)
        self._connections = Connections(limits.connect_timeout_s, self._secure)
        self._headers = {"authorization": f"Bearer {token}"} if token else {}
        self._head = (
            " HTTP/1.1\r\naccept: text/event-stream\r\ncontent-type: application/json\r\n"
            "user-agent: wherry-router\r\n" + "".join(f"{name}: {value}\r\n" for name, value in self._headers.items())
        )
        timeout = aiohttp.ClientTimeout(total=None, connect=None, sock_connect=limits.connect_timeout_s)
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=KEPT_S),
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
        self._connections.close()
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
            frames = Frames()
            async for data in response.content.iter_any():
                for frame in frames.feed(data):
                    update = decode_load(frame)
                    if update is not None:
                        yield update

    def _request(self, path: str, url: str, correlation_id: str, body: bytes) -> bytes:
        host = url.partition("//")[2]
        own = f"host: {host}\r\nx-correlation-id: {correlation_id}\r\ncontent-length: {len(body)}\r\n\r\n"
        return f"POST {path}{self._head}{own}".encode() + body

    async def execute(
        self,
        replica: Replica,
        body: bytes,
        correlation_id: str,
        deadline: float,
        leaves: Callable[[], bool] = lambda: False,
        path: str = "/execute",
    ) -> AsyncGenerator[Event, None]:
        """The worker's events. Closing the generator cancels it.

        Args:
            deadline: for the first token, in the event loop's time.
            leaves: asked now and then; once it is true, the try ends with the fault `draining`.
            path: what is asked of the worker.

        Raises:
            WorkerFault: the worker is gone, frozen, not ready, full, or does not speak the protocol.
            Expired: the deadline passed.
            ApiError: the worker refused the request itself.
        """
        url = replica.endpoint.url
        exchange = self._connections.exchange(url)
        health = self._health
        watchdog = Watchdog(
            self._limits.stall_s,
            begins_within(health.timeout(url), len(body)),
            deadline,
            lambda: health.ask(url),
            exchange.abort,
            leaves,
            lambda: health.is_well(url),
        )
        ended = False
        try:
            status = await exchange.send(self._request(path, url, correlation_id, body))
            watchdog.begun(promises=exchange.header(_PULSE) is not None)
            if status != 200:
                raise await _refusal(exchange, status)
            frames = Frames()
            # Reading goes on to the end of the body, which gives the connection back for the next request.
            while data := await exchange.read():
                for event in _events(frames.feed(data), watchdog):
                    ended = ended or type(event) is End or type(event) is ErrorEvent
                    watchdog.hold()
                    yield event
                    watchdog.reads()
            if not ended:
                raise Broken("the stream ended before the answer did")  # noqa: TRY301 - as if the connection had broken
        except (Unreachable, Broken, msgspec.DecodeError) as error:
            if ended:
                return  # what became of the connection afterwards is none of the answer
            if not exchange.answered:
                self._refused(url, error)
            fault = _fault(error, watchdog, self._limits.first_token_timeout_s)
            if isinstance(fault, WorkerFault):
                fault.since = watchdog.heard
            raise fault from None
        finally:
            watchdog.stop()
            exchange.close()


def _events(frames: list[bytes], watchdog: Watchdog) -> Iterator[Event]:
    for frame in frames:
        event = decode_frame(frame)
        if event is None:
            watchdog.beat()
            continue
        watchdog.touch()
        if type(event) is Token or type(event) is Embedding:
            watchdog.first_token()
        yield event


def _fault(error: Exception, watchdog: Watchdog, seconds: float) -> Exception:
    if watchdog.expired:
        return Expired(seconds)
    if watchdog.left:
        return WorkerFault("draining", "the replica's time to drain is over")
    if watchdog.mute:
        return WorkerFault("lost", "the connection is silent though the worker is well")
    if watchdog.lost:
        return WorkerFault("frozen", "no event, and no answer to /health")
    if isinstance(error, Unreachable):
        return WorkerFault("unreachable", str(error))
    if isinstance(error, msgspec.DecodeError):
        return WorkerFault("protocol", str(error))
    return WorkerFault("lost", str(error))


async def _refusal(exchange: Exchange, status: int) -> Exception:
    """What to raise for an answer other than 200."""
    body = b""
    while len(body) < _MAX_REFUSAL and (data := await exchange.read()):
        body += data
    try:
        event = _decode_error(body)
    except msgspec.DecodeError:
        event = ErrorEvent(code="worker_error", message=f"the worker answered {status}")
    if status == 429:
        after = exchange.header(b"retry-after") or b"1"
        return QueueFull(ApiError(429, event.code, event.message, retry_after_s=int(after) if after.isdigit() else 1))
    if status == 401:
        # The router's own token is wrong: nothing that the client could mend.
        return WorkerFault("unauthorized", "the worker refused the router's token")
    if status >= 500:
        return WorkerFault("not_ready" if status == 503 else "worker_error", event.message)
    return ApiError(status, event.code, event.message, param=event.param)
