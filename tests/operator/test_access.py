"""Keys, limits and TLS of a router: from the spec to its pod, and what is said where a Secret is missing."""

import asyncio
import re
import ssl
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest
from aiohttp import web
from tests.operator.pods import NOW, owner, pod
from tests.operator.test_status import conditions, existing, observed, plan
from tests.router.certificates import pair

from wherry_operator.cluster import snapshot
from wherry_operator.cluster.asking import ask
from wherry_operator.desired.access import NeededSecret
from wherry_operator.desired.common import RenderSettings
from wherry_operator.desired.response_cache import cache_secrets
from wherry_operator.desired.router import router_args, router_template
from wherry_operator.desired.runtime import pod_template
from wherry_operator.planning.pods import PodView
from wherry_operator.planning.status import make_status
from wherry_operator.planning.types import Settings
from wherry_protocol.engine_config import fingerprint, from_args
from wherry_router.__main__ import argument_parser

OIDC = {"issuer": "https://issuer.example", "audience": "wherry"}
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {
    "nothing": ({}, []),
    "keys": ({"auth": {"secretName": "k"}}, ["--api-keys=/etc/wherry/keys", "--limit-routers=1"]),
    "tokens": (
        {"auth": {"oidc": OIDC | {"tenantClaim": "team"}}},
        ["--oidc-issuer=https://issuer.example", "--oidc-audience=wherry", "--oidc-tenant-claim=team"],
    ),
    "limits": (
        {
            "replicas": 3,
            "limits": {"perKey": {"requestsPerMinute": 60, "concurrent": 2}, "total": {"tokensPerMinute": 9}},
        },
        ["--limit-key=requests=60,concurrent=2", "--limit-total=tokens=9", "--limit-routers=3"],
    ),
    "together": (
        {"limits": {"perTenant": {"tokensPerMinute": 5}, "redis": {"url": "redis://r", "fallback": "closed"}}},
        [
            "--limit-tenant=tokens=5",
            "--limit-fallback=closed",
            "--limit-namespace=default/chat",
            "--limit-routers=1",
        ],
    ),
    "answers in Redis": (
        {"responseCache": {"size": "64Mi", "redis": {"url": "redis://r"}}},
        [
            "--response-cache-bytes=67108864",
            "--response-cache-ttl-s=600",
            "--response-cache-version=",
            "--response-cache-namespace=default/chat",
        ],
    ),
    "answers by meaning": (
        {
            "responseCache": {
                "semantic": {
                    "url": "https://e/v1/embeddings",
                    "model": "m",
                    "similarityThreshold": 0.875,
                    "timeout": "50ms",
                    "maxQuestions": 7,
                    "maxChars": 300,
                }
            }
        },
        [
            "--response-cache-bytes=268435456",
            "--response-cache-ttl-s=600",
            "--response-cache-version=",
            "--embedding-url=https://e/v1/embeddings",
            "--embedding-model=m",
            "--embedding-timeout-s=0.05",
            "--similarity-threshold=0.875",
            "--similarity-questions=7",
            "--similarity-max-chars=300",
        ],
    ),
    "TLS": ({"tls": {"secretName": "t"}}, ["--tls-cert=/etc/wherry/tls/tls.crt", "--tls-key=/etc/wherry/tls/tls.key"]),
}


@pytest.mark.parametrize("router, flags", CASES.values(), ids=CASES)
def test_what_the_spec_says_reaches_the_router(router: dict[str, Any], flags: list[str]) -> None:
    who = owner(spec={"router": router})
    assert who.spec is not None
    plain = owner()
    assert plain.spec is not None
    args = router_args(who, who.spec)
    added = [arg for arg in args if arg not in router_args(plain, plain.spec)]
    assert [re.sub(r"(cache-version=)\w{16}$", r"\1", arg) for arg in added] == flags
    argument_parser().parse_args(args)


@pytest.mark.parametrize(
    "more", [{}, {"workerTLS": {"secretName": "t"}}, {"quantization": {"method": "int8"}}], ids=str
)
def test_the_caches_version_is_what_the_pods_tell(more: dict[str, Any]) -> None:
    """The kubelet puts a pod's own address into its arguments."""
    who = owner(spec={"router": {"responseCache": {"size": "64Mi"}}, **more})
    assert who.spec is not None
    [container] = pod_template(who, who.spec, RenderSettings(), "token")["spec"]["containers"]
    worker = from_args([arg.replace("$(POD_IP)", "10.0.0.7") for arg in container["args"]])
    assert worker.host == "10.0.0.7"
    assert f"--response-cache-version={fingerprint(worker)}" in router_args(who, who.spec)


def pod_spec(router: dict[str, Any]) -> dict[str, Any]:
    who = owner(spec={"router": router})
    assert who.spec is not None
    return dict(router_template(who, who.spec, RenderSettings(), "token")["spec"])


def test_secrets_are_mounted_and_probes_speak_tls() -> None:
    found = pod_spec({"auth": {"secretName": "k"}, "tls": {"secretName": "t"}})
    [container] = found["containers"]
    mounted = {v["name"]: v["secret"]["secretName"] for v in found["volumes"] if "secret" in v}
    assert mounted == {"api-keys": "k", "tls": "t"}
    places = {m["name"]: (m["mountPath"], m.get("readOnly")) for m in container["volumeMounts"]}
    assert places["api-keys"] == ("/etc/wherry/keys", True)
    probes = [container[f"{kind}Probe"]["httpGet"].get("scheme") for kind in ("startup", "liveness", "readiness")]
    assert probes == ["HTTPS"] * 3
    assert "scheme" not in str(pod_spec({}))


def test_redis_url_is_no_flag() -> None:
    for redis, expected in (
        ({"url": "redis://r"}, {"name": "WHERRY_REDIS_URL", "value": "redis://r"}),
        (
            {"secretName": "r"},
            {"name": "WHERRY_REDIS_URL", "valueFrom": {"secretKeyRef": {"name": "r", "key": "url"}}},
        ),
    ):
        [container] = pod_spec({"limits": {"redis": redis}})["containers"]
        assert container["env"][-1] == expected
        assert "redis://" not in str(container["args"])


def test_secrets_of_the_response_cache_are_no_flags() -> None:
    semantic = {"url": "http://e/v1/embeddings", "secretName": "e"}
    found = pod_spec({"responseCache": {"redis": {"secretName": "r"}, "semantic": semantic}})
    [container] = found["containers"]
    assert container["env"][-2:] == [
        {"name": "WHERRY_RESPONSE_CACHE_REDIS_URL", "valueFrom": {"secretKeyRef": {"name": "r", "key": "url"}}},
        {"name": "WHERRY_EMBEDDING_KEY", "valueFrom": {"secretKeyRef": {"name": "e", "key": "key"}}},
    ]
    who = owner(spec={"router": {"responseCache": {"redis": {"secretName": "r"}, "semantic": semantic}}})
    assert who.spec is not None
    assert cache_secrets(who.spec) == [
        NeededSecret("spec.router.responseCache.redis", "r", ("url",)),
        NeededSecret("spec.router.responseCache.semantic", "e", ("key",)),
    ]


LACKING = {
    "gone": (None, "the Secret 't' of spec.router.tls does not exist"),
    "half": ({"data": {"tls.crt": "eA=="}}, "the Secret 't' of spec.router.tls has no entry 'tls.key'"),
    "whole": ({"data": {"tls.crt": "eA==", "tls.key": "eA=="}}, ""),
}


@pytest.mark.parametrize("raw, text", LACKING.values(), ids=LACKING)
def test_what_a_secret_lacks(raw: dict[str, Any] | None, text: str) -> None:
    needed = NeededSecret("spec.router.tls", "t", ("tls.crt", "tls.key"))
    assert snapshot._lack(needed, raw) == text


MISSING = "the Secret 'k' of spec.router.auth does not exist"


def test_a_missing_secret_is_the_reason_that_is_told() -> None:
    who = owner(spec={"replicas": 1, "router": {"auth": {"secretName": "k"}}})
    waiting = observed(pod("a"), who=who, objects=existing(who, 1, readyReplicas=0), missing=(MISSING,))
    found = conditions(waiting, 1)
    assert found["RouterReady"] == ("False", "SecretNotFound", MISSING)
    assert found["Degraded"] == ("True", "SecretNotFound", MISSING)
    assert found["Available"][:2] == ("False", "SecretNotFound")
    # Those of before go on.
    serving = observed(pod("a"), who=who, objects=existing(who, 1), missing=(MISSING,))
    found = conditions(serving, 1)
    assert found["RouterReady"][0] == "True"
    assert found["Degraded"] == ("True", "SecretNotFound", MISSING)


def raw_pod(scheme: str | None) -> dict[str, Any]:
    probe = {"httpGet": {"path": "/readyz", "port": "http"} | ({"scheme": scheme} if scheme else {})}
    return {
        "metadata": {"name": "r", "uid": "u"},
        "spec": {"containers": [{"name": "router", "readinessProbe": probe}]},
    }


def test_each_router_is_asked_as_it_listens(tmp_path: Path) -> None:
    """In a rollout that turns TLS on there are both kinds."""
    found = pair()
    (tmp_path / "crt").write_text(found.cert)
    (tmp_path / "key").write_text(found.key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "crt", tmp_path / "key")

    async def answer(request: web.Request) -> web.Response:
        return web.json_response({"scheme": request.scheme, "key": request.headers.get("Authorization")})

    async def both() -> list[Any]:
        app = web.Application()
        app.router.add_get("/x", answer)
        runner = web.AppRunner(app)
        await runner.setup()
        secure = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=context)
        await secure.start()
        port = runner.addresses[0][1]
        plain = web.TCPSite(runner, "127.0.0.2", port)
        await plain.start()
        pods = [
            replace(PodView.from_raw(raw_pod(scheme)), ip=ip)
            for scheme, ip in (("HTTPS", "127.0.0.1"), (None, "127.0.0.2"), (None, "127.0.0.1"))
        ]
        try:
            return await ask(pods, port, "/x", "token", msgspec.json.Decoder(dict), 1000)
        finally:
            await runner.cleanup()

    assert asyncio.run(both()) == [
        {"scheme": "https", "key": "Bearer token"},
        {"scheme": "http", "key": "Bearer token"},
        None,
    ]


def test_the_url_says_how() -> None:

    who = owner(spec={"router": {"tls": {"secretName": "t"}}})
    assert make_status(plan(observed(who=who)), Settings(), NOW).url == "https://chat.default.svc:8000"
