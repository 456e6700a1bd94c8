"""Mutual TLS to workers: from the spec to the pods of both sides, and how the operator itself asks workers."""

import asyncio
import base64
from dataclasses import replace
from typing import Any

import pytest
from aiohttp import web
from tests.operator.pods import owner, pod
from tests.operator.test_status import conditions, existing, observed
from tests.router.certificates import WORKERS, Authority

from wherry_operator.autoscaling.decide import Signal
from wherry_operator.cluster import load, snapshot
from wherry_operator.cluster.client import Api
from wherry_operator.cluster.nodes import Nodes
from wherry_operator.cluster.probes import Prober
from wherry_operator.desired.access import needed_secrets
from wherry_operator.desired.common import RenderSettings
from wherry_operator.desired.router import router_args, router_template
from wherry_operator.desired.runtime import pod_template
from wherry_operator.planning.pods import PodView
from wherry_protocol import naming
from wherry_protocol.engine_config import from_args
from wherry_protocol.http.mutual_tls import ends_of
from wherry_protocol.worker import LoadReport
from wherry_router.__main__ import argument_parser
from wherry_router.discovery.pods import read

OURS, OTHER = Authority(), Authority("other")
ON = {"workerTLS": {"secretName": "w"}}


def pod_specs(spec: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The runtime's and the router's."""
    who = owner(spec=spec)
    assert who.spec is not None
    settings = RenderSettings()
    return pod_template(who, who.spec, settings, "t")["spec"], router_template(who, who.spec, settings, "t")["spec"]


NAMES = {"of the LLMDeployment": ({}, WORKERS), "given": ({"serverName": "llm.example"}, "llm.example")}


@pytest.mark.parametrize("more, name", NAMES.values(), ids=NAMES)
def test_both_sides_get_the_same_certificate_and_name(more: dict[str, str], name: str) -> None:
    for found in pod_specs({"workerTLS": {"secretName": "w"} | more}):
        [container] = found["containers"]
        assert {"name": "worker-tls", "secret": {"secretName": "w", "defaultMode": 0o444}} in found["volumes"]
        place = {"name": "worker-tls", "mountPath": "/etc/wherry/worker-tls", "readOnly": True}
        assert place in container["volumeMounts"]
        flags = [arg for arg in container["args"] if arg.startswith("--worker-tls")]
        assert flags == ["--worker-tls=/etc/wherry/worker-tls", f"--worker-tls-name={name}"]
    runtime, router = pod_specs(ON)
    config = from_args(runtime["containers"][0]["args"])
    assert (config.worker_tls_name, config.probe_port) == (WORKERS, 8002)
    assert argument_parser().parse_args(router["containers"][0]["args"]).worker_tls_name == WORKERS


def test_kubelets_ask_a_port_without_tls() -> None:
    [container] = pod_specs(ON)[0]["containers"]
    ports = {port["name"]: port["containerPort"] for port in container["ports"]}
    assert ports == {"https": 8000, "probe": 8002}
    probes = [container[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")]
    assert [probe["port"] for probe in probes] == ["probe"] * 3
    assert all("scheme" not in probe for probe in probes)
    group = {"parallelism": {"tensor": 2, "ranksPerPod": 1}}
    ports = {port["name"]: port["containerPort"] for port in pod_specs(ON | group)[0]["containers"][0]["ports"]}
    assert ports == {"https": 8000, "probe": 8002, "group": 8001}


def test_without_it_nothing_is_other_than_before() -> None:
    runtime, router = pod_specs({})
    assert "worker-tls" not in str(runtime) + str(router)
    [container] = runtime["containers"]
    assert container["ports"] == [{"name": "http", "containerPort": 8000, "protocol": "TCP"}]
    assert container["readinessProbe"]["httpGet"] == {"path": "/ready", "port": "http"}


@pytest.mark.parametrize("spec, secure", [({}, False), (ON, True)], ids=["plain", "mutual TLS"])
def test_router_and_operator_see_how_a_pod_speaks(spec: dict[str, Any], secure: bool) -> None:
    raw = {
        "metadata": {"name": "p", "uid": "u"},
        "spec": pod_specs(spec)[0],
        "status": {"podIP": "10.0.0.1"},
    }
    assert PodView.from_raw(raw).mutual_tls == secure
    endpoint = read(raw).endpoint
    assert endpoint is not None
    assert endpoint.url == ("https://10.0.0.1:8000" if secure else "http://10.0.0.1:8000")
    # A port of somebody else's container says nothing.
    raw["spec"]["containers"].insert(0, {"name": "sidecar", "ports": [{"name": "https", "containerPort": 443}]})
    assert PodView.from_raw(raw).mutual_tls == secure
    assert read(raw).endpoint == endpoint


def data(entries: dict[str, str]) -> dict[str, Any]:
    return {"data": {entry: base64.b64encode(text.encode()).decode() for entry, text in entries.items()}}


UNUSABLE = {
    "usable": (data(OURS.secret()), ""),
    "of another authority": (data(OTHER.secret(ca=OURS.cert)), "tls.crt cannot be a worker's certificate by ca.crt"),
    "of another deployment": (data(OURS.secret("else-workers.default.svc")), f"not valid for '{WORKERS}'"),
    "not base64": ({"data": dict.fromkeys(("ca.crt", "tls.crt", "tls.key"), "?")}, "cannot be used"),
    "not there": (None, ""),
}


@pytest.mark.parametrize("raw, text", UNUSABLE.values(), ids=UNUSABLE)
def test_what_is_wrong_with_a_secret_is_told(raw: dict[str, Any] | None, text: str) -> None:
    client, problem = snapshot.worker_client(owner(spec=ON), raw)
    assert text in problem
    assert (client is not None) == (text == "" and raw is not None)
    assert not problem or problem.startswith("the Secret 'w' of spec.workerTLS cannot be used: ")
    assert "PRIVATE" not in problem


def test_a_missing_secret_is_named() -> None:
    spec = owner(spec=ON).spec
    assert spec is not None
    [needed] = needed_secrets(spec)
    assert snapshot._lack(needed, None) == "the Secret 'w' of spec.workerTLS does not exist"
    lacking = {"data": {"tls.crt": "", "tls.key": ""}}
    assert snapshot._lack(needed, lacking) == "the Secret 'w' of spec.workerTLS has no entry 'ca.crt'"


def test_conditions_say_that_a_secret_cannot_be_used() -> None:
    who, why = owner(spec=ON | {"replicas": 1}), "the Secret 'w' of spec.workerTLS cannot be used: it is old"
    found = conditions(observed(pod("a"), who=who, objects=existing(who, 1), unusable=(why,)), 1)
    assert found["Degraded"] == ("True", "SecretInvalid", why)
    assert found["RouterReady"][0] == "True", "those from before go on"
    waiting = observed(pod("a"), who=who, objects=existing(who, 1, readyReplicas=0), unusable=(why,))
    assert conditions(waiting, 1)["RouterReady"] == ("False", "SecretInvalid", why)


class Asked:
    """A worker with mutual TLS, as far as the operator asks it; with what it was asked."""

    def __init__(self) -> None:
        self.tokens: list[str | None] = []

    async def load(self, request: web.Request) -> web.Response:
        self.tokens.append(request.headers.get("Authorization"))
        counts = dict.fromkeys(LoadReport.__struct_fields__, 0)
        busy = {"model": "tiny", "ready": True, "running": 4, "max_running": 64}
        return web.json_response(counts | busy | {"kv_tokens_used": 10, "kv_tokens_total": 100})


def client_of(secret: dict[str, str]) -> Any:
    client, problem = snapshot.worker_client(owner(spec=ON), data(secret))
    assert not problem
    return client


def test_the_operator_shows_its_token_only_to_workers_that_it_can_check() -> None:
    async def ask() -> None:
        asked, app = Asked(), web.Application()
        app.router.add_get("/load", asked.load)
        runner = web.AppRunner(app)
        await runner.setup()
        ends = ends_of({entry: text.encode() for entry, text in OURS.secret().items()}, WORKERS)
        await web.TCPSite(runner, "127.9.8.1", naming.WORKER_PORT, ssl_context=ends.worker).start()
        try:
            worker = pod("a", ip="127.9.8.1", mutual_tls=True)
            assert await load.poll([worker], "t", client_of(OURS.secret())) == [Signal(4, 0.1)]
            assert asked.tokens == ["Bearer t"]
            for client in (None, client_of(OTHER.secret())):
                assert await load.poll([worker], "t", client) == [None]
            plain = replace(worker, mutual_tls=False)
            assert await load.poll([plain], "t", client_of(OURS.secret())) == [None]
            assert asked.tokens == ["Bearer t"]
        finally:
            await runner.cleanup()

    asyncio.run(ask())


def test_the_operator_probes_where_kubelets_do() -> None:
    prober: Prober[str] = Prober(Api.__new__(Api), Nodes(Api.__new__(Api)))
    plain, secure = pod("a"), pod("b", mutual_tls=True)
    prober.watch("key", [plain, secure], [pod("r")], 5.0)
    assert [(target.pod.name, target.port) for target in prober._targets["key"]] == [
        ("a", naming.WORKER_PORT),
        ("b", naming.PROBE_PORT),
        ("r", naming.ROUTER_PORT),
    ]


def test_the_response_cache_does_not_begin_anew_for_it() -> None:
    """TLS changes no answer."""

    def version(spec: dict[str, Any]) -> list[str]:
        who = owner(spec=spec | {"router": {"responseCache": {}}})
        assert who.spec is not None
        return [arg for arg in router_args(who, who.spec) if "cache-version" in arg]

    assert version({}) == version(ON) != []
