"""Loopback addresses for one cluster, so that several can run at once.

127.0.0.0/8 is all this machine's. Each cluster takes a slot: four /16 networks in it, one for Services, one for pods,
one for the control plane and the nodes. A running cluster holds its slot by a socket name in the kernel, which goes
away with the process that holds it, so no stale lock can be left behind.
"""

import hashlib
import ipaddress
import socket
import time
from collections.abc import Collection
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from wherry_local.errors import LocalError

_FIRST, _SLOTS, _STRIDE = 8, 56, 4  # 127.8.0.0 … 127.231.255.255: clear of 127.0.0.1 and of resolvers' 127.0.0.53


@dataclass(frozen=True)
class Addresses:
    """What a cluster's parts listen on. `slot` decides all the addresses; ports are free ones found at creation."""

    slot: int
    api_port: int
    etcd_port: int
    etcd_peer_port: int
    controller_manager_port: int
    scheduler_port: int

    def _octet(self, network: int) -> int:
        return _FIRST + self.slot * _STRIDE + network

    @property
    def services(self) -> str:
        """CIDR of Service addresses."""
        return f"127.{self._octet(0)}.0.0/16"

    @property
    def api_service(self) -> str:
        """Cluster IP of the Service `kubernetes`: the API server gives itself the range's first."""
        return f"127.{self._octet(0)}.0.1"

    @property
    def pods(self) -> str:
        """CIDR of pod addresses; each node takes a /24 of it."""
        return f"127.{self._octet(1)}.0.0/16"

    @property
    def control_plane(self) -> str:
        """Address of the API server and its peers."""
        return f"127.{self._octet(2)}.0.1"

    def node(self, number: int) -> str:
        """Address of node `number`, from 1."""
        return f"127.{self._octet(2)}.1.{number}"

    def pod_network(self, number: int) -> str:
        """CIDR of the pods of node `number`, from 1."""
        return f"127.{self._octet(1)}.{number}.0/24"

    @property
    def api_url(self) -> str:
        """The API server's URL."""
        return f"https://{self.control_plane}:{self.api_port}"

    def to_json(self) -> dict[str, Any]:
        """For settings.json."""
        return asdict(self)


def _lock_name(slot: int) -> str:
    return f"\0wherry-local-slot-{slot}"


def hold(slot: int, wait_s: float = 3.0) -> socket.socket:
    """Hold `slot` until the returned socket is closed. Raises LocalError when another cluster has it.

    `wait_s` is for a holder that was killed and whose files the kernel is still closing.
    """
    holder = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    deadline = time.monotonic() + wait_s
    while True:
        try:
            holder.bind(_lock_name(slot))
        except OSError as error:
            if time.monotonic() < deadline:
                time.sleep(0.05)
                continue
            holder.close()
            raise _taken(slot) from error
        return holder


def _taken(slot: int) -> LocalError:
    return LocalError(
        f"another local cluster runs on this one's addresses (127.{_FIRST + slot * _STRIDE}.0.0/14): "
        "end it with `wherry local down`, or give this one new addresses with `wherry local down --purge`"
    )


def _free(slot: int) -> bool:
    try:
        hold(slot, wait_s=0).close()
    except LocalError:
        return False
    return True


def _port(address: str, preferred: int) -> int:
    for port in (preferred, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((address, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise LocalError(f"no port is free on {address}: local mode needs Linux's loopback network 127.0.0.0/8")


def choose(home: Path) -> Addresses:
    """Addresses for a new cluster in `home`: the slot that its path hashes to, or the next one not in use."""
    first = int.from_bytes(hashlib.sha256(str(home).encode()).digest()[:4], "big") % _SLOTS
    for step in range(_SLOTS):
        slot = (first + step) % _SLOTS
        if _free(slot):
            address = Addresses(slot, 0, 0, 0, 0, 0).control_plane
            return Addresses(slot, *(_port(address, port) for port in (6443, 2379, 2380, 10257, 10259)))
    raise LocalError(f"all {_SLOTS} address ranges for local clusters are in use: end one with `wherry local down`")


def free_address(network: str, taken: Collection[str], after: str = "") -> str:
    """The first address in the CIDR `network` that is not in `taken`, beginning after the address `after`."""
    hosts = [str(address) for address in ipaddress.ip_network(network).hosts()]
    start = hosts.index(after) + 1 if after in hosts else 0
    for address in hosts[start:] + hosts[:start]:
        if address not in taken:
            return address
    raise LocalError(f"no address is free in {network}")
