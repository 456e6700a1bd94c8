"""One pod's life on this node, from the first sight of it to its deletion."""

import asyncio
import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from wherry_local.files import read_json, write_atomic, write_json
from wherry_local.kube import STRATEGIC, UNREACHABLE, ApiError
from wherry_local.kubeconfig import pod_kubeconfig
from wherry_local.node.container import Container
from wherry_local.node.environment import ConfigError, Object, resolve
from wherry_local.node.mounts import Paths, expand
from wherry_local.node.probes import Target
from wherry_local.node.status import phase, pod_status, timestamp
from wherry_local.node.volumes import Volumes, object_data
from wherry_local.paths import executables
from wherry_protocol.naming import ENV_MEMORY_LIMIT

if TYPE_CHECKING:
    from wherry_local.node.agent import Node

log = logging.getLogger("wherry.local.pod")
_RETRY_S = 1.0
_REFRESH_S = 30.0
_TMP = "/tmp"  # noqa: S108 - a path in a container
_SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class PodWorker:
    """Drives the containers of one pod and publishes its status."""

    def __init__(self, node: "Node", pod: Object) -> None:
        self.node = node
        self.pod = pod
        metadata = pod["metadata"]
        self.uid: str = metadata["uid"]
        self.name: str = metadata["name"]
        self.namespace: str = metadata["namespace"]
        self.path = f"/api/v1/namespaces/{self.namespace}/pods/{self.name}"
        self.directory: Path = node.directory / "pods" / self.uid
        record = read_json(self.directory / "pod.json") or {}
        host = bool(self.spec.get("hostNetwork"))
        self.ip: str = record.get("ip") or (node.address if host else node.take_address())
        self.start_time: str = record.get("start_time") or timestamp()
        record |= {"ip": self.ip, "start_time": self.start_time, "name": self.name, "namespace": self.namespace}
        write_json(self.directory / "pod.json", record)
        self.volumes = Volumes(node.kube, pod, self.directory / "volumes", self.facts)
        self.init = [Container(self, spec, init=True) for spec in self.spec.get("initContainers") or []]
        self.main = [Container(self, spec, init=False) for spec in self.spec["containers"]]
        self.removed = False  # its object is gone from the API
        self._dirty = asyncio.Event()
        self._ending = asyncio.Event()
        self._task = asyncio.create_task(self._run(), name=f"pod {self.name}")

    @property
    def spec(self) -> Object:
        """The pod's spec."""
        return dict(self.pod["spec"])

    @property
    def facts(self) -> dict[str, Any]:
        """What the downward API and the status need to know."""
        return {
            "pod_ip": self.ip,
            "host_ip": self.node.address,
            "start_time": self.start_time,
            "allocatable": self.node.allocatable,
        }

    @property
    def done(self) -> bool:
        """True when nothing of the pod is left on this node."""
        return self._task.done()

    def update(self, pod: Object) -> None:
        """Take in the newest version of the object."""
        self.pod = self.volumes.pod = pod
        if pod["metadata"].get("deletionTimestamp"):
            self._ending.set()
        self.publish()  # others write here too: the node controller when this node was away, gates' owners

    def gone(self) -> None:
        """The object was deleted at once, without waiting for this node."""
        self.removed = True
        self._ending.set()

    def publish(self) -> None:
        """Have the status written soon; changes close together become one write."""
        self._dirty.set()

    async def _run(self) -> None:
        publisher = asyncio.create_task(self._publish_changes())
        living = asyncio.create_task(self._live_unless_ending())
        try:
            ending = asyncio.create_task(self._ending.wait())
            await asyncio.wait({ending, living}, return_when=asyncio.FIRST_COMPLETED)
            if living.done() and (error := living.exception()):
                log.error("pod %s/%s: %r", self.namespace, self.name, error, exc_info=error)
            await ending
            await self._stop()
        finally:
            for task in (living, publisher):
                task.cancel()
            await asyncio.gather(living, publisher, return_exceptions=True)
        await self._report_end()

    async def _live_unless_ending(self) -> None:
        await asyncio.sleep(0)  # `update` follows the constructor; a pod found already ending starts nothing
        if not self._ending.is_set():
            await self._live()

    async def _live(self) -> None:
        """Volumes, then init containers one after another, then all containers together."""
        self.publish()
        if phase(self.policy, *self._statuses()) in ("Succeeded", "Failed"):
            return
        await self._prepare_volumes()
        async with asyncio.TaskGroup() as group:
            refreshing = group.create_task(self._refresh_volumes())
            for container in self.init:
                run = group.create_task(container.run())
                await (container.was_started.wait() if container.sidecar else asyncio.shield(run))
                if not container.sidecar and container.status.exit_code != 0:
                    refreshing.cancel()
                    return
            runs = [group.create_task(container.run()) for container in self.main]
            await asyncio.wait(runs)
            for container in self.init:
                if container.sidecar:
                    await container.stop(float(self.spec.get("terminationGracePeriodSeconds", 30)))
            refreshing.cancel()

    @property
    def policy(self) -> str:
        """The pod's restart policy."""
        return str(self.spec.get("restartPolicy", "Always"))

    def _statuses(self) -> tuple[list[Any], list[Any]]:
        return [c.status for c in self.init], [c.status for c in self.main]

    async def _prepare_volumes(self) -> None:
        while True:
            try:
                return await self.volumes.prepare()
            except ConfigError as error:
                self.node.events.write(self.pod, "FailedMount", f"MountVolume.SetUp failed: {error}", warning=True)
            except (ApiError, *UNREACHABLE) as error:
                log.warning("volumes of %s/%s: %s", self.namespace, self.name, error)
            await asyncio.sleep(_RETRY_S)

    async def _refresh_volumes(self) -> None:
        """Keep Secrets, ConfigMaps and tokens in volumes fresh."""
        while True:
            await asyncio.sleep(_REFRESH_S * self.node.backoff_scale)
            try:
                await self.volumes.prepare()
            except (ConfigError, ApiError, *UNREACHABLE) as error:
                log.warning("refreshing volumes of %s/%s: %s", self.namespace, self.name, error)

    async def _lookup(self, kind: str, name: str) -> dict[str, str] | None:
        while True:
            try:
                data = await object_data(self.node.kube, self.namespace, kind, name)
            except ApiError as error:
                # Right after binding, the node authorizer may not know yet that this pod is ours.
                if error.status != 403:
                    raise ConfigError(str(error)) from error
                raise ConfigError(f'{kind} "{name}" is not readable yet: {error}') from error
            except UNREACHABLE as error:
                log.warning("reading %s %s: %s", kind, name, error)
                await asyncio.sleep(_RETRY_S)
                continue
            return None if data is None else {key: value.decode(errors="replace") for key, value in data.items()}

    def _paths(self, container: Container) -> Paths:
        """All mounts but /tmp: programs take that from TMPDIR, and this machine's own paths may well be under /tmp."""
        mounts = self.volumes.mounts(container.spec)
        return Paths({path: real for path, real in mounts.items() if path != _TMP})

    def _base_env(self, container: Container) -> dict[str, str]:
        own = container.directory
        for folder in ("home", "tmp"):
            (own / folder).mkdir(parents=True, exist_ok=True)
        limit = {} if container.memory_limit is None else {ENV_MEMORY_LIMIT: str(container.memory_limit)}
        return (
            {
                "PATH": f"{executables()}:{_SYSTEM_PATH}",
                "HOME": str(own / "home"),
                "HOSTNAME": self.name,
                "TMPDIR": self.volumes.mounts(container.spec).get(_TMP, str(own / "tmp")),
                "LANG": "C.UTF-8",
                "KUBERNETES_SERVICE_HOST": self.node.api_service,
                "KUBERNETES_SERVICE_PORT": "443",
            }
            | limit
            | self.node.container_env
        )

    async def _env(self, container: Container) -> dict[str, str]:
        base = self._base_env(container)
        env = await resolve(self.pod, container.spec, self._lookup, self.facts | {"base": base})
        paths = self._paths(container)  # for what the pod says; what local mode adds names real paths already
        env = {key: value if base.get(key) == value else paths.replace(value) for key, value in env.items()}
        token = self.volumes.token_file(container.spec)
        if token is not None and "KUBECONFIG" not in env:
            config = container.directory / "kubeconfig"
            write_atomic(
                config, pod_kubeconfig(self.node.kube.server, token.with_name("ca.crt"), token, self.namespace)
            )
            env["KUBECONFIG"] = str(config)
        return env

    async def command(self, container: Container) -> tuple[list[str], dict[str, str], str]:
        """(argv, environment, working directory) of a container; argv is empty where it has no command.

        Raises ConfigError when the environment names something that is not there.
        """
        env, paths, spec = await self._env(container), self._paths(container), container.spec
        words = [*(spec.get("command") or []), *(spec.get("args") or [])] if spec.get("command") else []
        argv = [paths.replace(expand(word, env)) for word in words]
        cwd = paths.replace(spec["workingDir"]) if spec.get("workingDir") else str(container.directory)
        return argv, env, cwd

    async def probe_target(self, container: Container) -> Target:
        """What probes of `container` act on."""
        try:
            _, env, cwd = await self.command(container)
        except ConfigError:  # something it was started with has been deleted since
            env, cwd = self._base_env(container), str(container.directory)
        return Target(container.spec, self.ip, env, cwd, self._paths(container).replace)

    async def _stop(self) -> None:
        metadata = self.pod["metadata"]
        default = float(self.spec.get("terminationGracePeriodSeconds", 30))
        grace = float(metadata.get("deletionGracePeriodSeconds") or 0) if "deletionTimestamp" in metadata else default
        if self.removed:
            grace = min(default, 2.0)
        regular = [*self.main, *(c for c in self.init if not c.sidecar)]
        await asyncio.gather(*(container.stop(grace) for container in regular))
        await asyncio.gather(*(container.stop(2.0) for container in self.init if container.sidecar))
        for container in [*self.init, *self.main]:
            if container.current is not None:  # a run that was just starting when the pod was stopped
                await container.current.kill()

    async def _report_end(self) -> None:
        """Tell the API the last status, then that the pod may go."""
        while not self.removed:
            try:
                await self._write_status()
                await asyncio.to_thread(shutil.rmtree, self.directory, True)
                body = {"gracePeriodSeconds": 0, "preconditions": {"uid": self.uid}}
                await self.node.kube.delete(self.path, body)
            except ApiError as error:
                if error.status in (404, 409):  # gone already, or another pod of that name
                    break
                log.warning("deleting %s/%s: %s", self.namespace, self.name, error)
            except UNREACHABLE as error:
                log.warning("deleting %s/%s: %s", self.namespace, self.name, error)
            else:
                return
            await asyncio.sleep(_RETRY_S)
        await asyncio.to_thread(shutil.rmtree, self.directory, True)

    async def _publish_changes(self) -> None:
        while True:
            await self._dirty.wait()
            self._dirty.clear()
            try:
                await self._write_status()
            except (ApiError, *UNREACHABLE) as error:
                if isinstance(error, ApiError) and error.status == 404:
                    continue
                log.warning("status of %s/%s: %s", self.namespace, self.name, error)
                self._dirty.set()
                await asyncio.sleep(_RETRY_S)
            await asyncio.sleep(0.02)

    async def _write_status(self) -> None:
        status = pod_status(self.pod, *self._statuses(), self.facts)
        old = self.pod.get("status") or {}
        if all(old.get(key) == value for key, value in status.items() if key != "conditions"):
            known = {condition["type"]: condition for condition in old.get("conditions") or []}
            if all(_same(condition, known.get(condition["type"])) for condition in status["conditions"]):
                return
        body = {"metadata": {"uid": self.uid}, "status": status}
        newest = await self.node.kube.patch(f"{self.path}/status", body, STRATEGIC)
        if newest["metadata"]["uid"] == self.uid:
            self.pod = newest


def _same(new: Object, old: Object | None) -> bool:
    return old is not None and all((old.get(key) or "") == (value or "") for key, value in new.items())
