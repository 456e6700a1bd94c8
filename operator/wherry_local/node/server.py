"""The part of the kubelet's HTTPS API that the API server calls for `kubectl logs`."""

import datetime
import ssl
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from aiohttp import web
from aiohttp.typedefs import Handler

from wherry_local.node.logs import LogOptions, parse_time, read
from wherry_local.node.process import Run

if TYPE_CHECKING:
    from wherry_local.node.agent import Node

_CLIENT = "kube-apiserver-kubelet-client"
_REFUSED = (
    "not possible in local mode: containers here are plain processes of this machine, with no container to enter. "
    "Read their output with `kubectl logs`; their files are in the state directory that `wherry local status` prints"
)
_NO_FORWARD = "not needed in local mode: pod and Service addresses are loopback addresses; connect to them directly"


@web.middleware
async def _authenticate(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Only the API server may ask. The handshake has checked the certificate; here it is asked whose it is."""
    certificate = request.transport.get_extra_info("peercert") if request.transport else None
    names = {value for part in (certificate or {}).get("subject", ()) for key, value in part if key == "commonName"}
    if _CLIENT not in names:
        return web.Response(status=401, text="only the API server may use a node's API\n")
    return await handler(request)


def _options(query: Mapping[str, str]) -> LogOptions:
    since = None
    if "sinceSeconds" in query:
        since = datetime.datetime.now(datetime.UTC) - datetime.timedelta(seconds=int(query["sinceSeconds"]))
    elif "sinceTime" in query:
        since = parse_time(query["sinceTime"])
    return LogOptions(
        follow=query.get("follow") == "true",
        tail=int(query.get("tailLines", -1)),
        since=since,
        timestamps=query.get("timestamps") == "true",
        limit_bytes=int(query.get("limitBytes", 0)),
    )


class NodeServer:
    """Serves logs on the node's address."""

    def __init__(self, node: "Node") -> None:
        self.node = node
        app = web.Application(middlewares=[_authenticate])
        app.router.add_get("/containerLogs/{namespace}/{pod}/{container}", self._logs)
        app.router.add_get("/healthz", self._healthz)
        for action in ("exec", "attach", "portForward", "run", "cri"):
            app.router.add_route("*", f"/{action}/{{rest:.*}}", self._refuse)
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def start(self, address: str, port: int, pki: Path) -> int:
        """Listen on `port`, or on a free one if it is taken; returns the port."""
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=pki / "ca.crt")
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_cert_chain(pki / f"{self.node.name}.crt", pki / f"{self.node.name}.key")
        await self._runner.setup()
        try:
            await web.TCPSite(self._runner, address, port, ssl_context=context).start()
        except OSError:
            await web.TCPSite(self._runner, address, 0, ssl_context=context).start()
        return int(self._runner.addresses[0][1])

    async def stop(self) -> None:
        """Stop serving."""
        await self._runner.cleanup()

    async def _healthz(self, _: web.Request) -> web.Response:
        return web.Response(text="ok")

    async def _refuse(self, request: web.Request) -> web.Response:
        action = request.path.split("/")[1]
        return web.Response(status=501, text=f"{action} is {_NO_FORWARD if action == 'portForward' else _REFUSED}\n")

    async def _logs(self, request: web.Request) -> web.StreamResponse:
        match = request.match_info
        container = self.node.container(match["namespace"], match["pod"], match["container"])
        if container is None:
            return web.Response(status=404, text=f'container "{match["container"]}" is not on this node\n')
        run = container.current
        if request.query.get("previous") == "true":
            run = Run(container.directory, run.number - 1) if run is not None and run.number > 0 else None
            if run is None or not run.log.exists():
                text = f'previous terminated container "{container.name}" in pod "{match["pod"]}" not found\n'
                return web.Response(status=400, text=text)
        if run is None:
            return web.Response(status=400, text=f'container "{container.name}" is waiting to start\n')
        answer = web.StreamResponse(headers={"Content-Type": "text/plain"})
        await answer.prepare(request)
        async for piece in read(run.log, _options(request.query), run.running):
            await answer.write(piece)
        await answer.write_eof()
        return answer
