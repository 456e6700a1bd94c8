"""Volumes of a pod as directories under the pod's own."""

import base64
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from wherry_local.files import write_atomic
from wherry_local.kube import Kube
from wherry_local.node.environment import ConfigError, Object, field, resource_field


async def object_data(kube: Kube, namespace: str, kind: str, name: str) -> dict[str, bytes] | None:
    """Data of the Secret or ConfigMap `name`; None when there is none."""
    found = await kube.find(f"/api/v1/namespaces/{namespace}/{kind}s/{name}")
    if found is None:
        return None
    if kind == "secret":
        return {key: base64.b64decode(value) for key, value in (found.get("data") or {}).items()}
    binary = {key: base64.b64decode(value) for key, value in (found.get("binaryData") or {}).items()}
    return {key: value.encode() for key, value in (found.get("data") or {}).items()} | binary


class Volumes:
    """Makes and refreshes the volumes of one pod under `directory`."""

    def __init__(self, kube: Kube, pod: Object, directory: Path, facts: Mapping[str, Any]) -> None:
        self.kube = kube
        self.pod = pod
        self.namespace: str = pod["metadata"]["namespace"]
        self.directory = directory
        self.facts = facts
        self.real: dict[str, Path] = {}

    async def prepare(self) -> None:
        """Make every volume. Raises ConfigError naming the first that cannot be made yet."""
        for volume in self.pod["spec"].get("volumes") or []:
            self.real[volume["name"]] = await self._prepare(volume)

    async def _prepare(self, volume: Object) -> Path:
        own = self.directory / str(volume["name"])
        if host := volume.get("hostPath"):
            return _host_path(volume["name"], host)
        if claim := volume.get("persistentVolumeClaim"):
            return await self._claim(claim["claimName"])
        own.mkdir(parents=True, exist_ok=True)
        if "emptyDir" in volume:
            return own
        files = await self._files(volume)
        for path, content in files.items():
            target = own / path
            if not target.resolve().is_relative_to(own.resolve()):
                raise ConfigError(f"volume {volume['name']!r}: the path {path!r} leaves the volume")
            if not target.exists() or target.read_bytes() != content:
                write_atomic(target, content)
        # What was taken out of a Secret must not stay: it may be a key that somebody lost.
        kept = {own / path for path in files}
        for found in [path for path in own.rglob("*") if path.is_file() and path not in kept]:
            found.unlink()
        return own

    async def _files(self, volume: Object) -> dict[str, bytes]:
        if source := volume.get("secret"):
            return await self._object_files("secret", source["secretName"], source)
        if source := volume.get("configMap"):
            return await self._object_files("configmap", source["name"], source)
        if source := volume.get("downwardAPI"):
            return self._downward(source)
        if source := volume.get("projected"):
            files: dict[str, bytes] = {}
            for part in source.get("sources") or []:
                files |= await self._projected(volume["name"], part)
            return files
        kind = next((key for key in volume if key != "name"), "?")
        raise ConfigError(f"volume {volume['name']!r}: local mode has no volumes of type {kind}")

    async def _projected(self, volume: str, part: Object) -> dict[str, bytes]:
        if source := part.get("serviceAccountToken"):
            return {source["path"]: await self._token(source, self.directory / volume / source["path"])}
        if source := part.get("secret"):
            return await self._object_files("secret", source["name"], source)
        if source := part.get("configMap"):
            return await self._object_files("configmap", source["name"], source)
        if source := part.get("downwardAPI"):
            return self._downward(source)
        raise ConfigError(f"volume {volume!r}: local mode cannot project {', '.join(part)}")

    async def _object_files(self, kind: str, name: str, source: Object) -> dict[str, bytes]:
        data = await object_data(self.kube, self.namespace, kind, name)
        if data is None:
            if source.get("optional"):
                return {}
            raise ConfigError(f'{kind} "{name}" not found')
        items = source.get("items")
        if not items:
            return data
        missing = [item["key"] for item in items if item["key"] not in data]
        if missing and not source.get("optional"):
            raise ConfigError(f"{kind} {name!r} has no key {missing[0]!r}")
        return {item["path"]: data[item["key"]] for item in items if item["key"] in data}

    def _downward(self, source: Object) -> dict[str, bytes]:
        files = {}
        for item in source.get("items") or []:
            if ref := item.get("fieldRef"):
                value = field(self.pod, ref["fieldPath"], self.facts["pod_ip"], self.facts["host_ip"])
            else:
                value = resource_field(self.pod, {}, item["resourceFieldRef"], self.facts["allocatable"])
            files[item["path"]] = value.encode()
        return files

    async def _token(self, source: Object, current: Path) -> bytes:
        """A token bound to this pod; the one in `current` while less than half of its time has passed."""
        lifetime = source.get("expirationSeconds", 3600)
        if (fresh := _younger(current, lifetime / 2)) is not None:
            return fresh
        account = self.pod["spec"].get("serviceAccountName") or "default"
        metadata = self.pod["metadata"]
        bound = {"kind": "Pod", "apiVersion": "v1", "name": metadata["name"], "uid": metadata["uid"]}
        spec: Object = {"expirationSeconds": lifetime, "boundObjectRef": bound}
        spec["audiences"] = [source["audience"]] if source.get("audience") else []
        path = f"/api/v1/namespaces/{self.namespace}/serviceaccounts/{account}/token"
        body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": spec}
        return str((await self.kube.create(path, body))["status"]["token"]).encode()

    async def _claim(self, name: str) -> Path:
        claim = await self.kube.find(f"/api/v1/namespaces/{self.namespace}/persistentvolumeclaims/{name}")
        if claim is None:
            raise ConfigError(f'persistentvolumeclaim "{name}" not found')
        volume_name = claim["spec"].get("volumeName")
        if not volume_name or claim["status"].get("phase") != "Bound":
            raise ConfigError(f'persistentvolumeclaim "{name}" is not bound to a volume')
        volume = await self.kube.find(f"/api/v1/persistentvolumes/{volume_name}")
        host = ((volume or {}).get("spec") or {}).get("hostPath") or ((volume or {}).get("spec") or {}).get("local")
        if not host:
            raise ConfigError(
                f"persistent volume {volume_name!r} is neither hostPath nor local, all that local mode has"
            )
        return _host_path(volume_name, host)

    def mounts(self, container: Object) -> dict[str, str]:
        """Real path of each mount path of `container`."""
        result = {}
        for mount in container.get("volumeMounts") or []:
            base = self.real[mount["name"]]
            result[mount["mountPath"].rstrip("/")] = str(base / mount["subPath"] if mount.get("subPath") else base)
        return result

    def token_file(self, container: Object) -> Path | None:
        """The service account token that `container` has mounted where Kubernetes mounts it."""
        real = self.mounts(container).get("/var/run/secrets/kubernetes.io/serviceaccount")
        return Path(real) / "token" if real else None


def _host_path(name: str, source: Object) -> Path:
    path, kind = Path(source["path"]), str(source.get("type") or "")
    if kind in ("DirectoryOrCreate", "FileOrCreate"):
        (path if kind == "DirectoryOrCreate" else path.parent).mkdir(parents=True, exist_ok=True)
        if kind == "FileOrCreate":
            path.touch()
    if kind in ("Directory", "DirectoryOrCreate") and not path.is_dir():
        raise ConfigError(f"hostPath type check failed: {path} is not a directory")
    if not path.exists():
        raise ConfigError(f"volume {name!r}: {path} does not exist on this machine")
    return path


def _younger(path: Path, age_s: float) -> bytes | None:
    """The content of `path` if it was written less than `age_s` seconds ago."""
    try:
        return path.read_bytes() if time.time() - path.stat().st_mtime < age_s else None
    except FileNotFoundError:
        return None
