"""Models that are downloaded: what their pods get, and what the operator makes of their workers' answers."""

import asyncio
import contextlib
from typing import Any

import pytest
from aiohttp import web
from tests.operator.pods import loading, owner

from wherry_operator.cluster.client import Api
from wherry_operator.cluster.nodes import Nodes
from wherry_operator.cluster.probes import Prober
from wherry_operator.desired.access import needed_secrets
from wherry_operator.desired.common import RenderSettings
from wherry_operator.desired.runtime import pod_template
from wherry_operator.planning.causes import cause_of
from wherry_operator.planning.downloads import progress_of
from wherry_operator.planning.pods import Quality
from wherry_protocol import naming

CACHE = {"name": "WHERRY_MODEL_CACHE", "value": "/var/cache/wherry/models"}
SECRET = {"name": "WHERRY_MODEL_SECRET", "value": "/etc/wherry/model-secret"}


def rendered(uri: str, secret: str | None = None, cache: dict[str, Any] | None = None) -> dict[str, Any]:
    who = owner({"model": {"name": "a", "uri": uri, "secretName": secret}, "modelCache": cache})
    assert who.spec is not None
    assert [need.name for need in needed_secrets(who.spec)] == ([secret] if secret else [])
    return dict(pod_template(who, who.spec, RenderSettings(), "token")["spec"])


CACHES = {
    "an emptyDir": (None, {"emptyDir": {}}, {}),
    "an emptyDir with a bound": ({"sizeLimit": "50Gi"}, {"emptyDir": {"sizeLimit": "50Gi"}}, {}),
    "a claim": (
        {"claimName": "c"},
        {"persistentVolumeClaim": {"claimName": "c"}},
        {"fsGroup": 65532, "fsGroupChangePolicy": "OnRootMismatch"},
    ),
    "a node's directory": ({"hostPath": "/m"}, {"hostPath": {"path": "/m", "type": "Directory"}}, {}),
}


@pytest.mark.parametrize("cache, volume, security", CACHES.values(), ids=CACHES)
def test_the_cache(cache: dict[str, Any] | None, volume: dict[str, Any], security: dict[str, Any]) -> None:
    found = rendered("hf://org/name", None, cache)
    [container] = found["containers"]
    assert {"name": "model-cache", **volume} in found["volumes"]
    assert {"name": "model-cache", "mountPath": CACHE["value"]} in container["volumeMounts"]
    assert CACHE in container["env"]
    assert SECRET not in container["env"]
    assert "--model-uri=hf://org/name" in container["args"]
    assert {k: v for k, v in found["securityContext"].items() if k.startswith("fsGroup")} == security


@pytest.mark.parametrize("uri", ["s3://bucket/x", f"https://h/a.gguf#sha256={'0' * 64}", "oci://r/m:v1"])
def test_the_secret_is_mounted_and_in_no_variable(uri: str) -> None:
    found = rendered(uri, "keys")
    [container] = found["containers"]
    assert {"name": "model-secret", "secret": {"secretName": "keys", "defaultMode": 0o444}} in found["volumes"]
    assert {"name": "model-secret", "mountPath": SECRET["value"], "readOnly": True} in container["volumeMounts"]
    assert SECRET in container["env"]
    names = [
        e["valueFrom"]["secretKeyRef"]["name"] for e in container["env"] if "secretKeyRef" in e.get("valueFrom", {})
    ]
    assert names == ["chat-worker-token"]


@pytest.mark.parametrize("uri", ["sample://tiny", "file:///m", "pvc://claim/m"])
def test_models_that_are_here_need_no_cache(uri: str) -> None:
    found = rendered(uri)
    assert "model-cache" not in str(found)
    assert CACHE not in found["containers"][0]["env"]


@pytest.mark.parametrize(
    ("health", "text"),
    [
        (b'{"state":"downloading","download":{"bytes":6400000000,"total":15200000000}}', "40% of 15.2 GB"),
        (b'{"state":"downloading","download":{"bytes":99,"total":100,"text":"x"}}', "95% of 0.0 MB"),
        (b'{"state":"downloading","download":{"bytes":5,"total":0}}', "its size is not known"),
        (b'{"state":"downloading","download":{"bytes":-5,"total":2000000}}', "0% of 2.0 MB"),
        (b'{"state":"ready","heartbeat_age_s":0.1}', ""),
        (b'{"download":"all of it"}', ""),
        (b'{"state":"downloa', ""),
        (b"", ""),
    ],
)
def test_what_a_worker_says_of_its_download(health: bytes, text: str) -> None:
    assert progress_of(health) == text


def test_a_pod_that_downloads_says_so_as_its_cause() -> None:
    found = cause_of(loading("a", downloading="40% of 15.2 GB"))
    assert found is not None
    assert (found.reason, found.severity) == ("Downloading", "waiting")
    assert found.message == "pod a is downloading the model, 40% of 15.2 GB"


async def test_probes_follow_a_download_and_tell_of_each_step() -> None:
    health: dict[str, Any] = {"state": "loading"}

    asked = asyncio.Event()

    async def answer(_: web.Request) -> web.Response:
        asked.set()
        return web.json_response(health)

    app = web.Application()
    app.router.add_get("/health", answer)
    runner = web.AppRunner(app)
    await runner.setup()
    address = "127.84.3.9"  # the port is every worker's
    await web.TCPSite(runner, address, naming.WORKER_PORT).start()
    told: list[str] = []
    prober: Prober[str] = Prober(Api.__new__(Api), Nodes(Api.__new__(Api)), changed=told.append)
    prober.watch("key", [loading("a", ip=address)], [], 60.0)
    probing = asyncio.create_task(prober.run())

    async def probing_round() -> None:
        asked.clear()
        await asked.wait()
        await asyncio.sleep(0)

    async def until(text: str) -> None:
        for _ in range(1500):
            if prober.downloads.get("uid-a", "") == text:
                return
            await asyncio.sleep(0.02)
        raise AssertionError(f"not {text!r}, but {prober.downloads}")

    try:
        health |= {"state": "downloading", "download": {"bytes": 41, "total": 100}}
        await until("40% of 0.0 MB")
        count = len(told)
        assert count >= 1
        health |= {"download": {"bytes": 77, "total": 100}}
        await until("75% of 0.0 MB")
        del health["download"]
        await until("")
        assert len(told) >= count + 2
        assert set(told) == {"key"}
        count = len(told)
        health |= {
            "state": "ready",
            "quality": {"method": "int4", "divergence": 0.001, "change": -0.002, "tokens": 255},
        }
        while "uid-a" not in prober.qualities or len(told) == count:
            await asyncio.wait_for(probing_round(), 30)
        assert prober.qualities["uid-a"] == Quality("int4", 0.001, -0.002, 255)
    finally:
        probing.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await probing
        await runner.cleanup()
