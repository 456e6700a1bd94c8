"""The background process that keeps a cluster's processes running: `python -m wherry_local.supervisor HOME`.

It reads `desired.json` (again on SIGHUP and when a process ends), starts what should run and is not, restarts what
ended, and writes `state.json`. It adopts processes that a supervisor before it started, so killing it harms nothing.
SIGTERM stops every process, last started first, and ends it.
"""

import asyncio
import contextlib
import logging
import os
import signal
import ssl
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from wherry_local import addresses
from wherry_local.components import Component
from wherry_local.errors import LocalError
from wherry_local.files import read_json, write_json
from wherry_local.paths import ENV_MARK, Home
from wherry_local.processes import Identity

log = logging.getLogger("wherry.local.supervisor")
_BACKOFF_FIRST_S, _BACKOFF_MAX_S, _STABLE_S = 0.5, 10.0, 30.0


async def answers(url: str, context: ssl.SSLContext) -> bool:
    """True when `url` answers 200 (`http`, `https`) or takes a connection (`tcp`)."""
    parts = urlsplit(url)
    secure = context if parts.scheme == "https" else None
    try:
        async with asyncio.timeout(2):
            reader, writer = await asyncio.open_connection(parts.hostname, parts.port, ssl=secure)
            try:
                if parts.scheme == "tcp":
                    return True
                writer.write(f"GET {parts.path} HTTP/1.1\r\nHost: {parts.netloc}\r\nConnection: close\r\n\r\n".encode())
                return b" 200 " in await reader.readline()
            finally:
                writer.close()
    except (OSError, TimeoutError):
        return False


class Runner:
    """Keeps one component running."""

    def __init__(self, supervisor: "Supervisor", name: str) -> None:
        self.supervisor = supervisor
        self.name = name
        self.identity: Identity | None = None
        self.restarts = 0
        self.ready = asyncio.Event()
        self.state = "waiting"
        self.last_exit = ""

    @property
    def component(self) -> Component:
        return self.supervisor.desired[self.name]

    def to_json(self) -> dict[str, Any]:
        identity = self.identity.to_json() if self.identity else {"pid": 0, "started": ""}
        return identity | {
            "state": self.state,
            "ready": self.ready.is_set(),
            "restarts": self.restarts,
            "last_exit": self.last_exit,
        }

    def _set(self, state: str) -> None:
        self.state = state
        self.supervisor.publish()

    async def run(self) -> None:
        backoff = _BACKOFF_FIRST_S
        while True:
            if self.identity is None:
                for name in self.component.after:
                    await self.supervisor.runners[name].ready.wait()
                process = await self._start()
            else:
                log.info("adopted %s, process %d", self.name, self.identity.pid)
                process = None
            began = time.monotonic()
            self._set("running")
            async with asyncio.TaskGroup() as group:
                checking = group.create_task(self._check_ready())
                code = await self._ended(process)
                checking.cancel()
            self.identity = None
            self.ready.clear()
            self.last_exit = code
            self.supervisor.reload()
            if not self.component.run:
                return self._set("stopped")
            backoff = _BACKOFF_FIRST_S if time.monotonic() - began > _STABLE_S else min(backoff * 2, _BACKOFF_MAX_S)
            log.warning("%s ended (%s); starting it again in %.1f s", self.name, code, backoff)
            self._set("backoff")
            await asyncio.sleep(backoff)
            self.restarts += 1

    async def _start(self) -> asyncio.subprocess.Process:
        component, path = self.component, self.supervisor.home.log(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        env = os.environ | {ENV_MARK: str(self.supervisor.home.root)} | component.env
        with path.open("ab") as file:
            process = await asyncio.create_subprocess_exec(
                *component.argv,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                env=env,
                cwd=self.supervisor.home.root,
                start_new_session=True,
            )
        self.identity = Identity.of(process.pid)
        log.info("started %s, process %d", self.name, process.pid)
        return process

    async def _ended(self, process: asyncio.subprocess.Process | None) -> str:
        if process is not None:
            code = await process.wait()
            return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        if self.identity is not None:
            await self.identity.wait()
        return "ended while adopted"

    async def _check_ready(self) -> None:
        url, delay = self.component.ready_url, 0.05
        while url and not await answers(url, self.supervisor.tls):
            await asyncio.sleep(delay)
            delay = min(delay * 1.5, 1.0)
        self.ready.set()
        self.supervisor.publish()

    async def stop(self, task: asyncio.Task[None]) -> None:
        """End the process, politely first, and do not start it again."""
        identity = self.identity
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        if identity is not None and identity.send(signal.SIGTERM):
            identity.send(signal.SIGCONT)  # a frozen process cannot see SIGTERM
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self.component.stop_grace_s):
                    await identity.wait()
            if identity.send(signal.SIGKILL):
                log.warning("%s did not end in time and was killed", self.name)
                await identity.wait()
        self.identity = None
        self.ready.clear()
        self._set("stopped")


class Supervisor:
    """All of a cluster's runners."""

    def __init__(self, home: Home) -> None:
        self.home = home
        self.desired: dict[str, Component] = {}
        self.runners: dict[str, Runner] = {}
        self.tasks: dict[str, asyncio.Task[None]] = {}
        self.tls = ssl.create_default_context(cafile=home.pki / "ca.crt")
        self.tls.check_hostname = False  # the scheduler and the controller manager sign their own
        self.tls.verify_mode = ssl.CERT_NONE
        self.changed = asyncio.Event()

    def reload(self) -> None:
        """Read what should run, and wake the main loop to make it so."""
        self.desired = {item["name"]: Component(**item) for item in read_json(self.home.desired) or []}
        self.changed.set()

    def publish(self) -> None:
        """Write state.json."""
        own = Identity.of(os.getpid())
        state = {"supervisor": own.to_json() if own else {}}
        write_json(self.home.state, state | {"components": {n: r.to_json() for n, r in self.runners.items()}})

    def adopt(self) -> None:
        """Take over the live processes in state.json."""
        for name, value in ((read_json(self.home.state) or {}).get("components") or {}).items():
            identity = Identity.from_json(value)
            if identity is not None and identity.alive():
                self.runners[name] = Runner(self, name)
                self.runners[name].identity = identity
                self.runners[name].restarts = int(value.get("restarts", 0))

    async def _reconcile(self) -> None:
        for name in [name for name in self.runners if name not in self.desired]:
            if name in self.tasks:
                await self.runners[name].stop(self.tasks.pop(name))
            del self.runners[name]
        for name, component in self.desired.items():
            self.runners.setdefault(name, Runner(self, name))
            task = self.tasks.get(name)
            if component.run and (task is None or task.done()):
                if task is not None and not task.cancelled() and (error := task.exception()):
                    raise error
                self.tasks[name] = asyncio.create_task(self.runners[name].run(), name=name)
        self.publish()

    async def run(self) -> None:
        """Supervise until SIGTERM or SIGINT."""
        stopping = asyncio.Event()
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGHUP, self.reload)
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stopping.set)
        self.reload()
        self.adopt()
        stop = asyncio.create_task(stopping.wait())
        while not stopping.is_set():
            self.changed.clear()
            await self._reconcile()
            change = asyncio.create_task(self.changed.wait())
            await asyncio.wait({stop, change}, return_when=asyncio.FIRST_COMPLETED)
            change.cancel()
        await self._stop_all()

    async def _stop_all(self) -> None:
        """Clients first, then the control plane, etcd last, so that each can still write its last words."""
        for names in _stop_order(list(self.desired.values())):
            runners = [(self.runners[name], self.tasks.pop(name)) for name in names if name in self.tasks]
            await asyncio.gather(*(runner.stop(task) for runner, task in runners))
        self.runners.clear()
        self.publish()


def _stop_order(desired: list[Component]) -> list[list[str]]:
    """Waves of names: each waits for those that depend on it."""
    left = {component.name: set(component.after) for component in desired}
    waves = []
    while left:
        needed = set().union(*left.values())
        wave = [name for name in left if name not in needed]
        if not wave:
            raise LocalError(f"components depend on each other in a circle: {sorted(left)}")
        waves.append(wave)
        left = {name: after for name, after in left.items() if name not in wave}
    return waves


def main() -> None:
    """Run in the background; errors go to the supervisor's log."""
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    home = Home(Path(sys.argv[1]))
    try:
        with addresses.hold(read_json(home.settings)["slot"]):
            asyncio.run(Supervisor(home).run())
    except LocalError as error:
        log.error("%s", error)  # noqa: TRY400 - the message is all there is to say
        sys.exit(1)


if __name__ == "__main__":
    main()
