"""Where this process is in its group: from the settings and the environment. Pure but for reading these."""

import hashlib
import os
import socket
from dataclasses import dataclass
from importlib.metadata import version

import msgspec

from wherry_protocol import naming
from wherry_protocol.engine_config import EngineConfig
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.parallel.shard import Shard

ENV_RANK = "WHERRY_RANK"  # of a process that another one of the pod started
ENV_PARENT = "WHERRY_RANK_PARENT"  # the process that did
ENV_LINK = "WHERRY_RANK_LINK"  # descriptor of its connection to the leader
ENV_MEMORY = "WHERRY_RANK_MEMORY"  # descriptor of the memory that the pod's ranks share
# Where ranks may differ.
OWN = ("host", "port", "threads", "weight_cache", "drain_timeout_s", "kv_cache_bytes")


@dataclass(frozen=True)
class Place:
    """A rank of a group.

    Attributes:
        key: the group's; another group's ranks are refused.
        per_pod: ranks in each pod.
        leader: address of rank 0's pod; None where all ranks are in this one.
    """

    shard: Shard
    key: str
    per_pod: int
    leader: str | None

    @property
    def local_rank(self) -> int:
        return self.shard.rank % self.per_pod

    @property
    def one_pod(self) -> bool:
        return self.per_pod == self.shard.size

    def beside(self) -> list[Shard]:
        """The other ranks that the first one of this pod starts."""
        first = self.shard.rank
        return [Shard(rank, self.shard.size) for rank in range(first + 1, first + self.per_pod)]


def place(config: EngineConfig) -> Place:
    """This process's.

    Raises:
        ModelError: bad_setting, for ranks that do not fill their pods or an environment that does not fit them.
    """
    size = config.tensor_parallel
    per_pod = config.ranks_per_pod or size
    if size < 1 or per_pod < 1 or size % per_pod:
        raise ModelError("bad_setting", f"{size} ranks cannot be {per_pod} in each pod")
    pods = size // per_pod
    pod = _number(naming.ENV_WORKER_INDEX, 0) if pods > 1 else 0
    named = _number(naming.ENV_GROUP_SIZE, 1)
    if pods > 1 and (named != pods or pod >= pods):
        raise ModelError(
            "bad_setting",
            f"{size} ranks, {per_pod} in each pod, are {pods} pods; {naming.ENV_GROUP_SIZE}={named} and "
            f"{naming.ENV_WORKER_INDEX}={pod} say otherwise",
        )
    leader = None
    if pods > 1:
        leader = os.environ.get(naming.ENV_LEADER_ADDRESS) or os.environ.get(naming.ENV_POD_IP)
        if not leader:
            raise ModelError("bad_setting", f"{naming.ENV_LEADER_ADDRESS} does not say where the group's leader is")
    rank = _number(ENV_RANK, pod * per_pod)
    return Place(Shard(rank, size), os.environ.get(naming.ENV_GROUP, ""), per_pod, leader)


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not text.isdecimal():
        raise ModelError("bad_setting", f"{name}={text!r} is no number")
    return int(text)


def settings_digest(config: EngineConfig) -> str:
    """A digest of the version and of every setting that all ranks must have alike."""
    fields = {k: v for k, v in msgspec.structs.asdict(config).items() if k not in OWN}
    fields["version"] = version("wherry")
    return hashlib.sha256(msgspec.json.encode(fields, order="sorted")).hexdigest()


def secret() -> bytes:
    """What the ranks of a group know and nobody else: the worker token."""
    return os.environ.get(naming.ENV_WORKER_TOKEN, "").encode()


def listen(address: str, port: int) -> socket.socket:
    """A listening socket on this address alone.

    Raises:
        ModelError: cannot_listen.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((address, port))
        sock.listen(64)
    except OSError as e:
        sock.close()
        raise ModelError("cannot_listen", f"{address}:{port}: {e.strerror}") from e
    return sock
