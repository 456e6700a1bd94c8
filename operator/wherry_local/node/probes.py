"""Probes and preStop handlers: httpGet, tcpSocket, exec, sleep."""

import asyncio
import contextlib
import os
import signal
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any

import aiohttp

Object = dict[str, Any]
_OUTPUT = 10 * 1024  # bytes of a probe's output that are kept, as in the kubelet


def port_number(container: Object, port: str | int) -> int:
    """The number of a port given by number or by name. Raises ValueError for a name that the container lacks."""
    if isinstance(port, int) or port.isdigit():
        return int(port)
    for entry in container.get("ports") or []:
        if entry.get("name") == port:
            return int(entry["containerPort"])
    raise ValueError(f"the container has no port named {port!r}")


@dataclass(frozen=True)
class Target:
    """What a handler acts on: the container, its address, and how to run a command in its environment."""

    container: Object
    address: str
    env: Mapping[str, str]
    cwd: str
    replace: Callable[[str], str]


async def _http(action: Object, target: Target) -> tuple[bool, str]:
    host = action.get("host") or target.address
    url = f"{action.get('scheme', 'HTTP').lower()}://{host}:{port_number(target.container, action['port'])}"
    path = action.get("path") or "/"
    headers = {"User-Agent": "kube-probe/local", "Accept": "*/*", "Connection": "close"}
    headers |= {item["name"]: item["value"] for item in action.get("httpHeaders") or []}
    url += path if path.startswith("/") else f"/{path}"
    async with (
        aiohttp.ClientSession(connector=aiohttp.TCPConnector(ssl=False, force_close=True)) as session,
        session.get(url, headers=headers) as answer,
    ):
        body = (await answer.content.read(_OUTPUT)).decode(errors="replace")
        if 200 <= answer.status < 400:
            return True, body
        return False, f"HTTP probe failed with statuscode: {answer.status}"


async def _tcp(action: Object, target: Target) -> tuple[bool, str]:
    port = port_number(target.container, action["port"])
    _, writer = await asyncio.open_connection(action.get("host") or target.address, port)
    writer.close()
    return True, ""


async def _exec(action: Object, target: Target) -> tuple[bool, str]:
    argv = [target.replace(word) for word in action.get("command") or []]
    process = await asyncio.create_subprocess_exec(
        *argv,
        env=target.env,
        cwd=target.cwd,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = await process.communicate()
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return process.returncode == 0, output[:_OUTPUT].decode(errors="replace")


async def _sleep(action: Object) -> tuple[bool, str]:
    await asyncio.sleep(action.get("seconds", 0))
    return True, ""


async def act(handler: Object, target: Target, timeout_s: float) -> tuple[bool, str]:
    """Run a handler once: (succeeded, what it said). Never raises for what the container did."""
    try:
        async with asyncio.timeout(timeout_s):
            if action := handler.get("httpGet"):
                return await _http(action, target)
            if action := handler.get("tcpSocket"):
                return await _tcp(action, target)
            if action := handler.get("exec"):
                return await _exec(action, target)
            if action := handler.get("sleep"):
                return await _sleep(action)
    except TimeoutError:
        return False, f"probe timed out after {timeout_s:g}s"
    except (OSError, ValueError, aiohttp.ClientError) as error:
        return False, str(error) or type(error).__name__
    return False, "local mode knows the handlers httpGet, tcpSocket, exec and sleep"


class Probe:
    """One probe of a running container, with the kubelet's counting of successes and failures."""

    def __init__(self, kind: str, spec: Object, target: Target) -> None:
        self.kind = kind
        self.spec = spec
        self.target = target
        self.healthy = kind == "liveness"

    async def run(self, changed: Callable[[bool, str], Awaitable[None]], failed: Callable[[str], None]) -> None:
        """Probe until cancelled. `changed` is told each new verdict, `failed` every single failure."""
        period = float(self.spec.get("periodSeconds") or 10)
        timeout = float(self.spec.get("timeoutSeconds") or 1)
        thresholds = {True: self.spec.get("successThreshold") or 1, False: self.spec.get("failureThreshold") or 3}
        await asyncio.sleep(float(self.spec.get("initialDelaySeconds") or 0))
        last, streak, told = None, 0, None
        while True:
            began = asyncio.get_running_loop().time()
            success, output = await act(self.spec, self.target, timeout)
            if not success:
                failed(output)
            streak = streak + 1 if success == last else 1
            last = success
            if streak >= thresholds[success] and success != told:
                told = success
                await changed(success, output)
            await asyncio.sleep(max(0.0, period - (asyncio.get_running_loop().time() - began)))
