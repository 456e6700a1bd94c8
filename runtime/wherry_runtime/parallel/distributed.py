"""Ranks that meet through torch.distributed. Imported where it is used: it takes memory and time."""

import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # it is there

from wherry_protocol.http.auth import is_loopback
from wherry_runtime.loading.config import ModelConfig
from wherry_runtime.parallel.shard import Shard, Span

# A rank that is lost is found by its silence (`peer`), long before this.
JOIN_TIMEOUT = timedelta(minutes=10)


class Distributed:
    """torch.distributed: gloo between processes on CPUs, on one host or many; NCCL between GPUs.

    Args:
        shard: this rank.
        config: of the whole model.
        process_group: of all ranks.
    """

    def __init__(self, shard: Shard, config: ModelConfig, process_group: dist.ProcessGroup) -> None:
        self._shard = shard
        self._group = process_group
        self._columns = [other.vocabulary(config) for other in shard.everyone()]
        self._widest = max(span.length for span in self._columns)

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        dist.all_reduce(x, group=self._group)
        return x

    def gather(self, x: torch.Tensor, columns: Span) -> torch.Tensor:
        rows = x.shape[0]
        if rows == 0:
            return x.new_empty(0, columns.total)
        padded = x.new_zeros(rows, self._widest)
        padded[:, : columns.length] = x
        if not self._shard.first:
            dist.gather(padded, None, 0, group=self._group)
            return x
        parts = [torch.empty_like(padded) for _ in self._columns]
        dist.gather(padded, parts, 0, group=self._group)
        return torch.cat([part[:, : span.length] for part, span in zip(parts, self._columns, strict=True)], dim=1)


def join(shard: Shard, store: tuple[str, int], *, cuda: bool) -> dist.ProcessGroup:
    """The process group of all ranks, which meet at `store`, an address and a port where the first one listens."""
    address, port = store
    if is_loopback(address) and not cuda:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "nccl" if cuda else "gloo",
        store=TCPStore(address, port, shard.size, is_master=False, timeout=JOIN_TIMEOUT),
        rank=shard.rank,
        world_size=shard.size,
        timeout=JOIN_TIMEOUT,
    )
    group = dist.group.WORLD
    if group is None:
        raise RuntimeError("torch.distributed has no group")
    return group


def host(sock: socket.socket, size: int) -> TCPStore:
    """The store that `join` meets at, on a listening socket, for as long as it lives."""
    address, port = sock.getsockname()[:2]
    return TCPStore(
        address,
        port,
        size,
        is_master=True,
        wait_for_workers=False,
        timeout=JOIN_TIMEOUT,
        master_listen_fd=sock.detach(),
    )
