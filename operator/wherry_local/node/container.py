"""One container's life: image, start, probes, exit, back-off, restart."""

import asyncio
import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherry_local.node.environment import ConfigError
from wherry_local.node.logs import last_lines
from wherry_local.node.probes import Probe, act
from wherry_local.node.process import Exit, Run
from wherry_local.node.status import ContainerStatus, timestamp, waiting, whole_seconds
from wherry_protocol.quantity import parse_quantity

if TYPE_CHECKING:
    from wherry_local.node.pod import PodWorker

log = logging.getLogger("wherry.local.container")

_BACKOFF_FIRST_S, _BACKOFF_MAX_S, _BACKOFF_RESET_S = 10.0, 300.0, 600.0
_MESSAGE_BYTES, _FALLBACK_BYTES, _FALLBACK_LINES = 4096, 2048, 80
_UNPULLABLE = re.compile(r"^[^/]+\.invalid(:\d+)?/")


class Backoff:
    """The kubelet's crash back-off: none before the first restart, then doubling; forgotten after a long run."""

    def __init__(self, scale: float) -> None:
        self.scale = scale
        self.delay = 0.0

    def next(self, ran_s: float = 0.0) -> float:
        """Seconds to wait before the next start, given how long the container has just run."""
        if ran_s > _BACKOFF_RESET_S:
            self.delay = 0.0
        current = self.delay
        self.delay = min(current * 2, _BACKOFF_MAX_S) if current else _BACKOFF_FIRST_S
        return current * self.scale


class Container:
    """Runs one container of a pod until it has ended for good or the pod stops it."""

    def __init__(self, pod: "PodWorker", spec: dict[str, Any], *, init: bool) -> None:
        self.pod = pod
        self.spec = spec
        self.init = init
        self.sidecar = init and spec.get("restartPolicy") == "Always"
        self.name: str = spec["name"]
        self.directory: Path = pod.directory / "containers" / self.name
        self.status = ContainerStatus(self.name, spec["image"], sidecar=self.sidecar)
        if not init and pod.spec.get("initContainers"):
            self.status.state = waiting("PodInitializing")
        self.current: Run | None = None
        self.finished = asyncio.Event()
        self.was_started = asyncio.Event()
        self._stopping = False
        self._began = self._ran_s = 0.0
        self._backoff = Backoff(pod.node.backoff_scale)
        self._restore()

    @property
    def policy(self) -> str:
        """The restart policy that holds for this container."""
        policy = self.pod.spec.get("restartPolicy", "Always")
        if self.sidecar:
            return "Always"
        return "OnFailure" if self.init and policy == "Always" else policy

    @property
    def memory_limit(self) -> int | None:
        """Bytes that this container may use, or None."""
        limit = ((self.spec.get("resources") or {}).get("limits") or {}).get("memory")
        return int(parse_quantity(limit)) if limit else None

    def _restore(self) -> None:
        """Take up the run that an earlier node process left."""
        self.current = Run.latest(self.directory)
        if self.current is None:
            return
        self.status.restarts = self.current.number
        if not self.current.running():
            ended = self.current.exit()
            self._set_terminated(ended)
            if not self._restarts_after(ended):
                self.finished.set()

    def _event(self, reason: str, message: str, *, warning: bool = False) -> None:
        self.pod.node.events.write(self.pod.pod, reason, message, self.name, warning=warning)

    def _set_waiting(self, reason: str, message: str = "") -> None:
        if "terminated" in self.status.state:
            self.status.last_state = self.status.state
        self.status.state = waiting(reason, message)
        self.status.ready = self.status.started = False
        self.pod.publish()

    def _restarts_after(self, ended: Exit) -> bool:
        if self._stopping:
            return False
        return self.policy == "Always" or (self.policy == "OnFailure" and ended.code != 0)

    async def run(self) -> None:
        """Run until the container has ended for good."""
        while not self.finished.is_set():
            adopted = self.current is not None and self.current.running()
            if not adopted and not await self._start():
                continue
            ended = await self._watch()
            self._set_terminated(ended)
            if not self._restarts_after(ended):
                self.finished.set()
                self.pod.publish()
                return
            self.pod.publish()
            await self._back_off()

    async def _back_off(self) -> None:
        delay = self._backoff.next(self._ran_s)
        if delay:
            where = f"{self.pod.name}_{self.pod.namespace}({self.pod.uid})"
            message = f"back-off {delay:g}s restarting failed container={self.name} pod={where}"
            self._set_waiting("CrashLoopBackOff", message)
            self._event("BackOff", f"Back-off restarting failed container {self.name} in pod {where}", warning=True)
            await asyncio.sleep(delay)

    async def _fail_start(self, reason: str, message: str) -> bool:
        self._set_waiting(reason, message)
        self._event("Failed", f"Error: {message}", warning=True)
        await asyncio.sleep(min(max(self._backoff.next(), 2.0 * self._backoff.scale), 30.0))
        return False

    async def _pull(self) -> bool:
        """Play at pulling: every image is there but those of a registry in `.invalid`, the domain kept for that."""
        image = self.spec["image"]
        if not _UNPULLABLE.match(image):
            return True
        host = image.partition("/")[0]
        message = f'failed to pull image "{image}": lookup {host}: no such host (emulated by local mode)'
        self._event("Pulling", f'Pulling image "{image}"')
        self._event("Failed", f'Failed to pull image "{image}": {message}', warning=True)
        self._set_waiting("ErrImagePull", message)
        await asyncio.sleep(min(2.0, self.pod.node.backoff_scale * 2.0))
        self._event("BackOff", f'Back-off pulling image "{image}"')
        self._set_waiting("ImagePullBackOff", f'Back-off pulling image "{image}": {message}')
        await asyncio.sleep(max(self._backoff.next(), 10.0 * self._backoff.scale))
        return False

    async def _start(self) -> bool:
        if not await self._pull():
            return False
        try:
            argv, env, cwd = await self.pod.command(self)
        except ConfigError as error:
            return await self._fail_start("CreateContainerConfigError", str(error))
        if not argv:
            message = f"container {self.name!r} has no command, and local mode does not know the entrypoint of image "
            return await self._fail_start("CreateContainerError", message + f"{self.spec['image']!r}: set `command`")
        number = 0 if self.current is None else self.current.number + 1
        run = Run(self.directory, number)
        env["WHERRY_TERMINATION_LOG"] = str(run.termination_log)
        error_text = await run.start(argv, env, cwd)
        self._prune(number)
        self.current, self.status.restarts = run, number
        if error_text:
            self._event("Failed", f"Error: {error_text}", warning=True)
            return True  # the run has ended before it began; it is handled like any other exit
        self._event("Started", f"Container started: {self.name}")
        return True

    def _prune(self, number: int) -> None:
        """Keep this run and the one before it, as `kubectl logs --previous` needs."""
        for path in self.directory.glob(f"{number - 2}.*"):
            path.unlink(missing_ok=True)

    async def _watch(self) -> Exit:
        """Follow the current run to its end, probing it."""
        run = self.current
        if run is None:
            raise RuntimeError("no run to watch")
        self._began = asyncio.get_running_loop().time()
        if run.running():
            if "terminated" in self.status.state:
                self.status.last_state = self.status.state
            self.status.state = {"running": {"startedAt": whole_seconds(str(run.state().get("started_at", "")))}}
            self.status.container_id = f"process://{self.pod.uid}/{self.name}/{run.number}"
            self.pod.publish()
        probing = asyncio.create_task(self._probe(run))
        try:
            return await run.wait()
        finally:
            self._ran_s = asyncio.get_running_loop().time() - self._began
            probing.cancel()
            await asyncio.gather(probing, return_exceptions=True)

    async def _probe(self, run: Run) -> None:
        target = await self.pod.probe_target(self)
        if spec := self.spec.get("startupProbe"):
            passed = asyncio.Event()

            async def startup(success: bool, output: str) -> None:
                if success:
                    passed.set()
                else:
                    await self._restart(run, "startup")

            probe = asyncio.create_task(Probe("startup", spec, target).run(startup, self._unhealthy("Startup")))
            try:
                await passed.wait()
            finally:
                probe.cancel()
        self.status.started = True
        self.was_started.set()
        if "readinessProbe" not in self.spec:
            self.status.ready = True
        self.pod.publish()

        async def ready(success: bool, output: str) -> None:
            self.status.ready = success
            self.pod.publish()

        async def alive(success: bool, output: str) -> None:
            if not success:
                await self._restart(run, "liveness")

        async with asyncio.TaskGroup() as group:
            for kind, react in (("readiness", ready), ("liveness", alive)):
                if spec := self.spec.get(f"{kind}Probe"):
                    probe_run = Probe(kind, spec, target).run(react, self._unhealthy(kind.capitalize()))
                    group.create_task(probe_run)

    def _unhealthy(self, kind: str) -> Any:
        return lambda output: self._event("Unhealthy", f"{kind} probe failed: {output}", warning=True)

    async def _restart(self, run: Run, kind: str) -> None:
        spec = self.spec[f"{kind}Probe"]
        self._event("Killing", f"Container {self.name} failed {kind} probe, will be restarted")
        grace = spec.get("terminationGracePeriodSeconds") or self.pod.spec.get("terminationGracePeriodSeconds", 30)
        await asyncio.shield(asyncio.create_task(run.stop(float(grace))))

    def _message(self, ended: Exit) -> str:
        """The termination message, by the container's policy."""
        run = self.current
        if run is None or ended.message:
            return ended.message
        try:
            text = run.termination_log.read_bytes()[-_MESSAGE_BYTES:].decode(errors="replace")
        except FileNotFoundError:
            text = ""
        if not text and ended.code and self.spec.get("terminationMessagePolicy") == "FallbackToLogsOnError":
            text = last_lines(run.log, _FALLBACK_LINES)[-_FALLBACK_BYTES:]
        return text

    def _set_terminated(self, ended: Exit) -> None:
        if "terminated" in self.status.state:
            self.status.last_state = self.status.state
        self.status.ready = False
        self.status.started = False
        self.status.container_id = f"process://{self.pod.uid}/{self.name}/{self.status.restarts}"
        finished = whole_seconds(ended.finished_at) if ended.finished_at else timestamp()
        self.status.state = {
            "terminated": {
                "exitCode": ended.code,
                "reason": ended.reason,
                "message": self._message(ended),
                "startedAt": whole_seconds(ended.started_at) if ended.started_at else finished,
                "finishedAt": finished,
                "containerID": self.status.container_id,
            }
            | ({"signal": ended.signal} if ended.signal else {})
        }

    async def stop(self, grace_s: float) -> None:
        """End the container for good: preStop, SIGTERM, SIGKILL after `grace_s` seconds in all."""
        self._stopping = True
        run = self.current
        if run is None or not run.running():
            self.finished.set()
            return
        self._event("Killing", f"Stopping container {self.name}")
        began = asyncio.get_running_loop().time()
        if grace_s > 0 and (handler := (self.spec.get("lifecycle") or {}).get("preStop")):
            succeeded, output = await act(handler, await self.pod.probe_target(self), grace_s)
            if not succeeded:
                self._event("FailedPreStopHook", f"PreStopHook failed: {output}", warning=True)
        await run.stop(max(0.0, grace_s - (asyncio.get_running_loop().time() - began)))
