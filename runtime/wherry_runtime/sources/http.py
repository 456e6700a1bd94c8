"""HTTP towards sources: one request with its redirects, and requests that are tried again.

urllib3 follows nothing by itself here, because where a redirect may lead is a question of safety: never from https to
http, never from a public host to this machine or a private network, and never with the credentials of another origin.
Of URLs only host and path are ever told: signatures and tokens travel in queries.
"""

import contextlib
import email.utils
import ipaddress
import logging
import random
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from typing import TypeVar
from urllib.parse import unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import certifi
import urllib3

from wherry_runtime.sources.types import Request, TransferError

log = logging.getLogger("wherry.sources")

CONNECT_S = 10.0
SILENCE_S = 60.0  # a server that sends nothing for so long is asked again
REDIRECTS = 8
TRIES = 8  # in a row, without a single byte
FIRST_PAUSE_S = 1.0
LONGEST_PAUSE_S = 60.0
LONGEST_ASKED_PAUSE_S = 600.0  # that a server may ask for by Retry-After
# What another origin may see of the first one's headers.
SAFE_HEADERS = frozenset({"accept", "accept-encoding", "if-match", "range", "user-agent"})
_RETRIED = frozenset({408, 425, 429, 500, 502, 503, 504})
T = TypeVar("T")


def shown(url: str) -> str:
    """The URL as it may be told: without user, query and fragment."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def is_private(host: str) -> bool:
    """Whether `host` is, or leads to, an address that is not of the public internet.

    A name that cannot be looked up counts as public: where a proxy is between, it alone can look up names.
    """
    try:
        found = {ipaddress.ip_address(host)}
    except ValueError:
        try:
            found = {
                ipaddress.ip_address(str(entry[4][0]).partition("%")[0]) for entry in socket.getaddrinfo(host, None)
            }
        except OSError:
            return False
    return any(not address.is_global for address in found)


def redirected(request: Request, location: str, first: str) -> Request:
    """The request that a redirect to `location` asks for. `first`: the URL that it all began with.

    Raises:
        TransferError: it must not be followed.
    """
    target = urljoin(request.url, location)
    before, after = urlsplit(request.url), urlsplit(target)
    if after.scheme not in ("http", "https") or not after.hostname:
        raise TransferError("redirect_refused", f"{shown(request.url)} redirects to {shown(target)}, which is not HTTP")
    if before.scheme == "https" and after.scheme == "http":
        raise TransferError("redirect_refused", f"{shown(request.url)} redirects from https to {shown(target)}")
    if _origin(target) == _origin(request.url):
        return Request(target, request.headers)
    if is_private(after.hostname) and not is_private(urlsplit(first).hostname or ""):
        raise TransferError(
            "redirect_refused", f"{shown(request.url)} redirects into a private network, to {shown(target)}"
        )
    return Request(target, {name: value for name, value in request.headers.items() if name.lower() in SAFE_HEADERS})


class Http:
    """Connections that are kept; for any thread. `stop`, once set, ends every wait with `TransferError`."""

    def __init__(self, stop: threading.Event | None = None) -> None:
        self.stop = stop or threading.Event()
        self.tries = TRIES
        context = ssl.create_default_context()
        context.load_verify_locations(certifi.where())
        self._options = {
            "timeout": urllib3.Timeout(connect=CONNECT_S, read=SILENCE_S),
            "retries": False,
            "ssl_context": context,
            "maxsize": 16,
        }
        self._direct = urllib3.PoolManager(**self._options)  # type: ignore[arg-type]
        self._proxies = getproxies()
        self._through: dict[str, urllib3.ProxyManager] = {}
        self._agent = f"wherry/{version('wherry')}"

    def _manager(self, url: str) -> urllib3.PoolManager:
        parts = urlsplit(url)
        proxy = self._proxies.get(parts.scheme)
        if not proxy or proxy_bypass(parts.hostname or ""):
            return self._direct
        if proxy not in self._through:
            at = urlsplit(proxy)
            login = f"{unquote(at.username)}:{unquote(at.password or '')}" if at.username else None
            headers = urllib3.make_headers(proxy_basic_auth=login)
            self._through[proxy] = urllib3.ProxyManager(proxy, proxy_headers=headers, **self._options)  # type: ignore[arg-type]
        return self._through[proxy]

    @contextlib.contextmanager
    def once(
        self, request: Request, extra: Mapping[str, str] | None = None, *, take: tuple[int, ...] = (200,)
    ) -> Iterator[urllib3.BaseHTTPResponse]:
        """The answer, behind its redirects, with a status of `take`.

        Raises:
            TransferError: there is none; with `retry` where it may be otherwise later.
        """
        headers = {"accept-encoding": "identity", "user-agent": self._agent, **request.headers, **(extra or {})}
        current = Request(request.url, headers)
        try:
            for _ in range(REDIRECTS):
                response = self._ask(current)
                if response.status in (301, 302, 303, 307, 308) and (location := response.headers.get("location")):
                    response.drain_conn()
                    response.release_conn()
                    current = redirected(current, location, request.url)
                    continue
                try:
                    if response.status not in take:
                        raise failure(current.url, response)
                    yield response
                finally:
                    # What is left unread is not worth the connection.
                    response.close()
                return
        except urllib3.exceptions.HTTPError as error:
            raise TransferError(
                "source_unreachable",
                f"{shown(current.url)}: {_why(error)}",
                # A certificate that is wrong stays wrong.
                retry=not isinstance(error, urllib3.exceptions.SSLError),
                unreachable=True,
            ) from None
        raise TransferError("redirect_refused", f"{shown(request.url)} redirects more than {REDIRECTS} times")

    def _ask(self, request: Request) -> urllib3.BaseHTTPResponse:
        return self._manager(request.url).request(
            "GET",
            request.url,
            headers=dict(request.headers),
            redirect=False,
            preload_content=False,
            decode_content=False,
        )

    def read(
        self, request: Request, limit: int, *, take: tuple[int, ...] = (200,)
    ) -> tuple[bytes, urllib3.BaseHTTPResponse]:
        """A whole body of at most `limit` bytes, and the answer that it came with; tried again where that may help.

        Raises:
            TransferError: why not.
        """

        def body() -> tuple[bytes, urllib3.BaseHTTPResponse]:
            with self.once(request, take=take) as response:
                data = response.read(limit + 1)
                if len(data) > limit:
                    raise TransferError("too_large", f"{shown(request.url)}: the answer is over {limit} bytes")
                return data, response

        return self.persist(body)

    def measure(self, request: Request) -> tuple[int | None, Mapping[str, str]]:
        """The size of a file, where the server tells, and the headers of the answer; without its bytes.

        Raises:
            TransferError: it cannot be had.
        """

        def ask() -> tuple[int | None, Mapping[str, str]]:
            # Not HEAD: a signed URL is for one method.
            with self.once(request, {"range": "bytes=0-0"}, take=(200, 206, 416)) as response:
                length = response.headers.get("content-length", "")
                if response.status != 200:
                    length = response.headers.get("content-range", "").rpartition("/")[2]
                return int(length) if length.isdigit() else None, response.headers

        return self.persist(ask)

    def persist(self, action: Callable[[], T]) -> T:
        """What `action` returns, tried `tries` times at most, with growing pauses, or as long as the server asks for.

        Raises:
            TransferError: of the last try.
        """
        for tried in range(1, self.tries + 1):
            try:
                return action()
            except TransferError as error:
                if not error.retry or tried == self.tries:
                    raise
                self.pause(error, tried)
        raise AssertionError("unreachable")

    def pause(self, error: TransferError, tried: int) -> None:
        """Waits before try number `tried` + 1.

        Raises:
            TransferError: everything is to end.
        """
        pause = min(FIRST_PAUSE_S * 2 ** (tried - 1), LONGEST_PAUSE_S)
        # Many pods that failed together must not come back together.
        pause *= random.uniform(0.75, 1.25)  # noqa: S311
        if error.after_s is not None:
            # No sooner than was asked for.
            pause = min(error.after_s, LONGEST_ASKED_PAUSE_S) * random.uniform(1.0, 1.1)  # noqa: S311
        log.warning("%s; trying again in %.1f s", error.message, pause)
        if self.stop.wait(pause):
            raise stopped()


def stopped() -> TransferError:
    """What a download ends with that is to end."""
    return TransferError("stopped", "the download was stopped")


def failure(url: str, response: urllib3.BaseHTTPResponse) -> TransferError:
    """What an answer means that is not the one hoped for."""
    status, where = response.status, shown(url)
    after = retry_after(response.headers)
    if status in (401, 403):
        hint = "the credentials do not allow it, or there are none; see the model's secretName"
        return TransferError("access_denied", f"{where}: {status}; {hint}")
    if status in (404, 410):
        return TransferError("model_not_found", f"{where}: {status}, there is no such thing")
    if status == 412:
        return TransferError("changed", f"{where}: it changed during the download; start again")
    if status == 429:
        return TransferError("rate_limited", f"{where}: 429, too many requests", retry=True, after_s=after)
    code = "source_unreachable" if status >= 500 else "refused"
    return TransferError(code, f"{where}: {status}", retry=status in _RETRIED, after_s=after, unreachable=status >= 500)


def retry_after(headers: Mapping[str, str]) -> float | None:
    """Seconds to wait, as Retry-After says (https://www.rfc-editor.org/rfc/rfc9110#field.retry-after), or RateLimit,
    which the hub sends (https://datatracker.ietf.org/doc/draft-ietf-httpapi-ratelimit-headers/)."""
    text = headers.get("retry-after", "").strip()
    if text.isdigit():
        return float(text)
    if text:
        with contextlib.suppress(ValueError):
            return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    found = re.search(r";\s*t=(\d+)", headers.get("ratelimit", ""))
    return float(found[1]) if found else None


def _why(error: urllib3.exceptions.HTTPError) -> str:
    """An error of urllib3 in words that hold no URL."""
    if isinstance(error, urllib3.exceptions.MaxRetryError) and error.reason:
        return type(error.reason).__name__
    names = {
        "NameResolutionError": "its name cannot be looked up",
        "NewConnectionError": "nobody answers there",
        "ConnectTimeoutError": f"no connection within {CONNECT_S:.0f} s",
        "ReadTimeoutError": f"nothing came for {SILENCE_S:.0f} s",
        "IncompleteRead": "the connection broke off",
        "ProtocolError": "the connection broke off",
        "SSLError": f"TLS failed ({str(error)[:200]})",
        "ProxyError": "the proxy does not answer",
    }
    return names.get(type(error).__name__, type(error).__name__)
