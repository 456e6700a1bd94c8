"""Groups of real processes: one pod of several ranks, several pods, and everything that can happen to them."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import httpx
import msgspec
import psutil
import pytest
from tests.router.harness import Process, eventually

from wherry_protocol import naming
from wherry_protocol.engine_config import from_args
from wherry_runtime.loading.errors import ModelError
from wherry_runtime.parallel.ending import EXIT_GROUP
from wherry_runtime.parallel.follow import join_leader
from wherry_runtime.parallel.group import Place
from wherry_runtime.parallel.peer import BEAT_S, MISSED
from wherry_runtime.parallel.shard import Shard

pytestmark = pytest.mark.alone

TOKEN = "a-token-of-tests"
SETTINGS = ["--model-name=m", "--model-uri=sample://tiny", "--threads=1"]
HEADERS = {"Authorization": f"Bearer {TOKEN}"}
PICKLE = b"cposix\nsystem\n(S'true'\ntR."  # would run a command where anything unpickled it
_hosts = (f"127.83.{os.getpid() % 250}.{n}" for n in itertools.count(1))


class Pod(Process):
    """One pod's process, on an address of its own, as pods have."""

    def __init__(self, host: str, *flags: str, **env: str) -> None:
        settings = [*SETTINGS, f"--host={host}", "--port=0", "--kv-cache-bytes=33554432", "--drain-timeout-s=30"]
        base = {naming.ENV_WORKER_TOKEN: TOKEN, naming.ENV_GROUP: "g1", naming.ENV_POD_IP: host}
        self.host = host
        super().__init__("wherry_runtime", [*settings, *flags], base | env)

    def ready(self) -> None:
        self.url = self.find(lambda p: next((str(m["url"]) for m in p.messages("listening")), ""))
        self.find(lambda _: "yes" if httpx.get(self.url + "/ready").status_code == 200 else "", 120)

    def ranks(self) -> list[psutil.Process]:
        """The processes that it started."""
        return psutil.Process(self.popen.pid).children()


@contextlib.contextmanager
def group(pods: int, ranks: int, *flags: str, hosts: Sequence[str] = ()) -> Iterator[list[Pod]]:
    """A group that is not ready yet; leaves no process behind."""
    hosts = hosts or [next(_hosts) for _ in range(pods)]
    size = [f"--tensor-parallel={ranks}", f"--ranks-per-pod={ranks // pods}"]
    started: list[Pod] = []
    try:
        for index, host in enumerate(hosts):
            lws = {naming.ENV_GROUP_SIZE: str(pods), naming.ENV_WORKER_INDEX: str(index)}
            if index:
                lws[naming.ENV_LEADER_ADDRESS] = hosts[0]
            started.append(Pod(host, *size, *flags, **(lws if pods > 1 else {})))
        yield started
    finally:
        for pod in started:  # all at once: one that does not lead stays for its leader's sake
            with contextlib.suppress(psutil.NoSuchProcess):
                for rank in pod.ranks():
                    rank.resume()
            pod.signal(signal.SIGCONT)
            pod.popen.terminate()
        for pod in started:
            pod.stop()


def execute(url: str, request_id: str = "r", **sampling: Any) -> Iterator[dict[str, Any]]:
    """The events of one answer."""
    body = {"id": request_id, "model": "m", "prompt": {"text": "The wind on the water"}, "sampling": sampling}
    with httpx.stream("POST", url + "/execute", json=body, headers=HEADERS, timeout=60) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line.startswith("data: "):
                yield json.loads(line[6:])


def answers(url: str) -> list[list[int]]:
    """Token ids, greedy and drawn, one alone and several at once."""
    found: dict[int, list[int]] = {}
    wanted = [{"temperature": 0.0}, *({"temperature": 0.9, "seed": seed} for seed in (1, 2, 3))]

    def one(index: int) -> None:
        events = execute(url, f"r{index}", max_tokens=24, **wanted[index])
        found[index] = [i for e in events if e["event"] == "token" for i in e["ids"]]

    one(0)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(1, len(wanted))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(len(ids) == 24 for ids in found.values())
    return [found[i] for i in range(len(wanted))]


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    """One rank's answers."""
    with group(1, 1, "--dtype=float32") as (pod,):
        pod.ready()
        return answers(pod.url)


@pytest.mark.parametrize(
    ("pods", "ranks", "backend"), [(1, 2, "native"), (1, 2, "pytorch"), (2, 2, "native"), (2, 4, "native")]
)
def test_answers_are_those_of_one_rank(expected: list[list[int]], pods: int, ranks: int, backend: str) -> None:
    with group(pods, ranks, "--dtype=float32", f"--backend={backend}") as members:
        for pod in members:
            pod.ready()
        assert sum(1 + len(pod.ranks()) for pod in members) == ranks
        assert answers(members[0].url) == expected


def test_a_pod_that_does_not_lead_refuses_requests_and_stays_for_the_leaders() -> None:
    """Both pods are told to stop while an answer runs: it is finished first."""
    with group(2, 2) as (leader, other):
        for pod in (leader, other):
            pod.ready()
        body = {"id": "r", "model": "m", "prompt": {"text": "x"}}
        refused = httpx.post(other.url + "/execute", json=body, headers=HEADERS)
        assert (refused.status_code, refused.json()["code"]) == (503, "not_leader")
        events = execute(leader.url, max_tokens=200, temperature=0.0, ignore_eos=True)
        assert [next(events)["event"] for _ in range(3)] == ["started", "token", "token"]
        other.signal(signal.SIGTERM)
        eventually(lambda: other.messages("state")[-1]["state"] == "draining")
        leader.signal(signal.SIGTERM)
        *_, last = events
        assert last["event"] == "end"
        assert last["completion_tokens"] == 200
        assert leader.wait() == 0
        other.wait()


def reason_of(pod: Pod) -> str:
    """What it says on its way out."""
    return next(line for line in pod.log().splitlines() if line.startswith("wherry-runtime: "))


def gone(processes: list[psutil.Process]) -> bool:
    return all(not p.is_running() or p.status() == psutil.STATUS_ZOMBIE for p in processes)


@pytest.mark.parametrize("fault", [signal.SIGKILL, signal.SIGSTOP])
def test_a_rank_of_the_same_pod_is_lost(fault: signal.Signals) -> None:
    with group(1, 2) as (pod,):
        pod.ready()
        events = execute(pod.url, max_tokens=4000, temperature=0.0, ignore_eos=True)
        next(events)
        (rank,) = pod.ranks()
        rank.send_signal(fault)
        with pytest.raises(httpx.HTTPError):
            for _ in events:
                pass
        assert pod.wait() == EXIT_GROUP
        if fault == signal.SIGKILL:
            assert re.search(r"rank 1 (was killed by signal 9|is gone)", reason_of(pod))
        else:
            silence = re.search(r"peer lost: rank 1 was silent for (\d\.\d) s", reason_of(pod))
            assert silence is not None
            assert float(silence[1]) <= 2.0
        eventually(lambda: gone([rank]))


def test_a_machine_that_stood_still_has_lost_nobody() -> None:
    with group(1, 2) as (pod,):
        pod.ready()
        processes = [psutil.Process(pod.popen.pid), *pod.ranks()]
        for process in processes:
            process.suspend()
        stopped = time.monotonic()
        eventually(lambda: time.monotonic() - stopped > 3 * MISSED * BEAT_S)
        for process in processes:
            process.resume()
        assert all(len(ids) == 24 for ids in answers(pod.url))
        assert pod.ranks() == processes[1:]


@pytest.mark.parametrize(("victim", "fault"), [(0, signal.SIGSTOP), (1, signal.SIGSTOP), (0, signal.SIGKILL)])
def test_a_pod_is_lost(victim: int, fault: signal.Signals) -> None:
    with group(2, 2) as pods:
        for pod in pods:
            pod.ready()
        pods[victim].signal(fault)
        other = pods[1 - victim]
        assert other.wait() == EXIT_GROUP
        name = "the leader" if victim == 0 else "rank 1"
        assert reason_of(other).startswith(f"wherry-runtime: peer lost: {name} ")


def test_a_group_forms_again_in_a_new_epoch() -> None:
    """Its processes are started again, as a kubelet does it, and meet anew."""
    hosts = [next(_hosts) for _ in range(2)]
    with group(2, 2, hosts=hosts) as pods:
        for pod in pods:
            pod.ready()
        epoch = pods[0].messages("the group is complete")[0]["epoch"]
        pods[1].kill()
        assert pods[0].wait() == EXIT_GROUP
        with group(2, 2, hosts=hosts) as again:
            for pod in again:
                pod.ready()
            assert again[0].messages("the group is complete")[0]["epoch"] > epoch
            assert len(answers(again[0].url)) == 4


def test_the_leader_of_children_is_killed() -> None:
    with group(1, 2) as (pod,):
        pod.ready()
        ranks = pod.ranks()
        pod.kill()
        eventually(lambda: gone(ranks))


def test_strangers_are_refused_and_the_group_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another group's rank, one with another token or other settings, a second rank 1, and what is no rank at all."""
    with group(2, 2) as (leader, other):
        for pod in (leader, other):
            pod.ready()
        own = from_args([*SETTINGS, "--tensor-parallel=2", "--ranks-per-pod=1"])
        rank = Place(Shard(1, 2), "g1", 1, leader.host)
        strangers = [
            (own, replace(rank, key="g0"), TOKEN, "it is of another group"),
            (own, rank, "another", "it does not know the worker token"),
            (msgspec.structs.replace(own, max_running=3), rank, TOKEN, "its settings or version differ"),
            (own, replace(rank, shard=Shard(2, 3)), TOKEN, "there is no rank 2 of 3 here"),
            (own, rank, TOKEN, "rank 1 is there already; this epoch has begun without it"),
        ]
        for config, place, token, reason in strangers:
            monkeypatch.setenv(naming.ENV_WORKER_TOKEN, token)
            with pytest.raises(ModelError, match=f"did not take this rank: {reason}"):
                join_leader(config, place, 10)
        garbage = (PICKLE, b"\xff\xff\xff\x7f", b"GET / HTTP/1.1\r\n\r\n", b"\x05\0\0\0hello")
        for content in garbage:
            with socket.create_connection((leader.host, naming.GROUP_PORT), 10) as sock, contextlib.suppress(OSError):
                sock.sendall(content)
                sock.shutdown(socket.SHUT_WR)
                while sock.recv(4096):
                    pass
        eventually(lambda: len(leader.messages("connection refused")) == len(garbage) + len(strangers))
        assert len(answers(leader.url)) == 4
        assert TOKEN not in leader.log() + other.log()


class Stranger:
    """A process that is ended in any case."""

    def __init__(self, pod: Pod) -> None:
        self.pod = pod

    def close(self) -> None:
        self.pod.stop()


def test_a_rank_that_cannot_load_is_named_by_the_leader() -> None:
    hosts = [next(_hosts) for _ in range(2)]
    size = ["--tensor-parallel=2", "--ranks-per-pod=1"]
    lws = {naming.ENV_GROUP_SIZE: "2", naming.ENV_LEADER_ADDRESS: hosts[0]}
    leader = Pod(hosts[0], *size, **lws, **{naming.ENV_WORKER_INDEX: "0"})
    other = Pod(hosts[1], *size, "--kv-cache-bytes=1", **lws, **{naming.ENV_WORKER_INDEX: "1"})
    with contextlib.closing(Stranger(leader)), contextlib.closing(Stranger(other)):
        assert leader.wait(120) == 1
        assert other.wait(120) == 1
        assert reason_of(leader).startswith("wherry-runtime: kv_cache_too_small: rank 1: 0 bytes for the KV cache")


def test_a_leader_that_waits_for_its_ranks_stops_when_it_is_told_to() -> None:
    with group(2, 2) as (leader, other):
        other.stop()
        leader.find(lambda _: "yes" if listens(leader.host) else "")
        leader.popen.terminate()
        assert leader.wait(20) == 0


def listens(host: str) -> bool:
    with contextlib.suppress(OSError), socket.create_connection((host, naming.GROUP_PORT), 1):
        return True
    return False


def test_a_rank_that_waits_for_its_leader_stops_when_it_is_told_to() -> None:
    host = next(_hosts)
    lws = {naming.ENV_GROUP_SIZE: "2", naming.ENV_LEADER_ADDRESS: host, naming.ENV_WORKER_INDEX: "1"}
    with socket.create_server((host, naming.GROUP_PORT)) as mute:
        mute.settimeout(60)
        pod = Pod(next(_hosts), "--tensor-parallel=2", "--ranks-per-pod=1", **lws)
        with contextlib.closing(Stranger(pod)), mute.accept()[0]:
            pod.popen.terminate()
            assert pod.wait(20) == 0


@pytest.mark.parametrize(
    ("flags", "env", "message"),
    [
        (["--tensor-parallel=3"], {}, "cannot be split over 3 ranks; it can over 1, 2"),
        (["--tensor-parallel=4", "--ranks-per-pod=3"], {}, "4 ranks cannot be 3 in each pod"),
        (["--tensor-parallel=2", "--ranks-per-pod=1"], {}, "LWS_GROUP_SIZE=1 and LWS_WORKER_INDEX=0 say otherwise"),
        (
            ["--tensor-parallel=2", "--ranks-per-pod=1"],
            {naming.ENV_GROUP_SIZE: "2", naming.ENV_WORKER_INDEX: "one"},
            "LWS_WORKER_INDEX='one' is no number",
        ),
    ],
)
def test_settings_that_do_not_fit(flags: list[str], env: dict[str, str], message: str) -> None:
    with contextlib.closing(Stranger(Pod(next(_hosts), *flags, **env))) as stranger:
        assert stranger.pod.wait(60) in (1, 2)
        assert message in reason_of(stranger.pod)
