"""/healthz, /readyz and /metrics."""

from collections.abc import Callable

from aiohttp import web
from prometheus_client import generate_latest

from wherry_operator.metrics import REGISTRY


async def serve(host: str, port: int, ready: Callable[[], bool]) -> tuple[web.AppRunner, int]:
    """Starts the server; returns its runner, to be cleaned up, and the port it listens on.

    `/healthz` answers while the event loop runs; `/readyz` once the operator watches, whether it leads or stands by.
    """

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n") if ready() else web.Response(text="starting\n", status=503)

    async def metrics(_: web.Request) -> web.Response:
        return web.Response(body=generate_latest(REGISTRY), headers={"Content-Type": "text/plain; version=0.0.4"})

    app = web.Application()
    app.add_routes([web.get("/healthz", healthz), web.get("/readyz", readyz), web.get("/metrics", metrics)])
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    await web.TCPSite(runner, host, port).start()
    return runner, int(runner.addresses[0][1])
