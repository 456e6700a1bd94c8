"""What a pod gets and what its status says: each through a real API server and real processes."""

import base64
import json
import subprocess
import urllib.request
from pathlib import Path

import pytest
from tests.local.harness import TestCluster, eventually, pod, python, server


def fetch(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/", timeout=5) as answer:
        return answer.read().decode()


def test_kubectl_reads_and_changes_a_deployment(cluster: TestCluster) -> None:
    template = server("web")
    labels = {"matchLabels": {"app": "web"}}
    spec = {"replicas": 1, "selector": labels, "template": {"metadata": template["metadata"], "spec": template["spec"]}}
    spec["template"]["metadata"] = {"labels": {"app": "web"}}
    service = {"selector": {"app": "web"}, "ports": [{"port": 80, "targetPort": "http"}]}
    cluster.apply(
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": "web"}, "spec": spec},
        {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "web"}, "spec": service},
    )
    cluster.kubectl("scale", "deployment/web", "--replicas=3")
    cluster.kubectl("rollout", "status", "deployment/web", "--timeout=30s")
    assert cluster.kubectl("get", "pods", "-l", "app=web", "-o", "wide").count("1/1") == 3
    assert "Started" in cluster.kubectl("describe", "pods", "-l", "app=web")

    pods = cluster.get("pods", "-l", "app=web")["items"]
    names = {item["metadata"]["name"] for item in pods}
    assert len({item["status"]["podIP"] for item in pods}) == 3
    assert {item["spec"]["nodeName"] for item in pods} == {"node-1", "node-2"}
    address = cluster.get("service", "web")["spec"]["clusterIP"]
    eventually(lambda: {fetch(address) for _ in range(6)} == names, "the Service to reach all three pods in turn")

    cluster.kubectl("delete", "deployment", "web")
    eventually(lambda: not cluster.get("pods", "-l", "app=web").get("items"), "the pods to go")

    def refused() -> bool:
        try:
            fetch(address)
        except OSError:
            return True
        return False

    eventually(refused, "the Service without pods to refuse connections")


def test_logs(cluster: TestCluster) -> None:
    code = "import time\nfor i in range(40): print('line', i)\nprint('last', end='')\ntime.sleep(1.5)\nprint(' words')"
    cluster.apply(pod("talk", *python(code), restartPolicy="Never"))
    eventually(lambda: "running" in cluster.container("talk").get("state", {}), "the container to run")
    follow = subprocess.run(
        cluster.command("logs", "-f", "talk"), capture_output=True, text=True, timeout=60, check=True
    )
    assert follow.stdout == "".join(f"line {i}\n" for i in range(40)) + "last words\n"
    assert cluster.kubectl("logs", "talk", "--tail=2") == "line 39\nlast words\n"
    assert cluster.kubectl("logs", "talk", "--tail=0") == ""
    assert cluster.kubectl("logs", "talk", "--tail=1", "--timestamps").startswith("20")
    assert cluster.kubectl("logs", "talk", "--since=1h").count("\n") == 41
    assert cluster.kubectl("logs", "talk", "--since-time=2100-01-01T00:00:00Z") == ""
    assert cluster.kubectl("logs", "talk", "--limit-bytes=4") == "line"
    assert "not found" in cluster.kubectl("logs", "talk", "--previous", check=False)


def test_environment_volumes_and_paths(cluster: TestCluster, tmp_path: Path) -> None:
    (tmp_path / "host").mkdir()
    host = tmp_path / "host"
    (host / "weights").write_text("from the host")
    code = (
        "import json, os, sys\n"
        "read = {path: open(path).read() for path in sys.argv[1:]}\n"
        "print(json.dumps({'read': list(read.values()), 'env': dict(os.environ), 'cwd': os.getcwd()}))"
    )
    claim = {"accessModes": ["ReadWriteOnce"], "storageClassName": "", "resources": {"requests": {"storage": "1Mi"}}}
    cluster.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "s"}, "stringData": {"token": "hush", "B": "2"}},
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "c"}, "data": {"key": "value"}},
        {
            "apiVersion": "v1",
            "kind": "PersistentVolume",
            "metadata": {"name": "models"},
            "spec": {
                "capacity": {"storage": "1Mi"},
                "accessModes": ["ReadWriteOnce"],
                "hostPath": {"path": str(host)},
                "claimRef": {"namespace": "default", "name": "models"},
            },
        },
        {
            "apiVersion": "v1",
            "kind": "PersistentVolumeClaim",
            "metadata": {"name": "models"},
            "spec": claim | {"volumeName": "models"},
        },
    )
    container = {
        "args": ["$(WHERE)/token", "/etc/conf/key", "/models/m/weights", "/info/labels", "/kept/from-init"],
        "env": [
            {"name": "WHERE", "value": "/etc/secret"},
            {"name": "TOKEN", "valueFrom": {"secretKeyRef": {"name": "s", "key": "token"}}},
            {"name": "MAYBE", "valueFrom": {"configMapKeyRef": {"name": "none", "key": "x", "optional": True}}},
            {"name": "IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "LIMIT", "valueFrom": {"resourceFieldRef": {"resource": "limits.memory", "divisor": "1Mi"}}},
            {"name": "URI", "value": "file:///models/m/x $(UNKNOWN) $$(IP)"},
        ],
        "envFrom": [{"secretRef": {"name": "s"}, "prefix": "S_"}],
        "resources": {"limits": {"memory": "64Mi"}},
        "volumeMounts": [
            {"name": "secret", "mountPath": "/etc/secret"},
            {"name": "conf", "mountPath": "/etc/conf"},
            {"name": "models", "mountPath": "/models/m", "readOnly": True},
            {"name": "info", "mountPath": "/info"},
            {"name": "kept", "mountPath": "/kept"},
        ],
        "workingDir": "/kept",
    }
    init = {"name": "first", "image": "none", "command": ["sh", "-c", "echo made earlier > /kept/from-init"]}
    volumes = [
        {"name": "secret", "secret": {"secretName": "s"}},
        {"name": "conf", "configMap": {"name": "c"}},
        {"name": "models", "persistentVolumeClaim": {"claimName": "models"}},
        {"name": "info", "downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
        {"name": "kept", "emptyDir": {}},
    ]
    init["volumeMounts"] = [{"name": "kept", "mountPath": "/kept"}]  # type: ignore[assignment]
    one = pod("env", *python(code), container=container, initContainers=[init], volumes=volumes, restartPolicy="Never")
    cluster.apply(one)
    eventually(lambda: cluster.get("pod", "env")["status"].get("phase") == "Succeeded", "the pod to succeed")
    said = json.loads(cluster.kubectl("logs", "env"))
    env = said["env"]
    assert said["read"] == ["hush", "value", "from the host", 'app="env"', "made earlier\n"]
    assert (env["TOKEN"], env["S_B"], env["LIMIT"]) == ("hush", "2", "64")
    assert env["IP"] == cluster.get("pod", "env")["status"]["podIP"]
    assert env["URI"] == f"file://{host}/x $(UNKNOWN) $(IP)"
    assert "MAYBE" not in env
    assert said["cwd"].endswith("/volumes/kept")
    assert "hush" not in cluster.kubectl("get", "events", "-o", "json")
    cluster.kubectl("delete", "pod", "env")
    assert (host / "weights").exists(), "deleting a pod leaves what it mounted from the host"
    cluster.kubectl("delete", "pvc/models", "pv/models")


def test_a_service_account_may_use_the_api_as_its_role_says(cluster: TestCluster) -> None:
    cluster.kubectl("create", "role", "reader", "--verb=get", "--resource=pods", "--dry-run=client", "-o", "yaml")
    kubectl = str(cluster.assets / "kubectl")
    script = f"{kubectl} get pod whoami -o name; {kubectl} get secrets; true"
    cluster.apply(pod("whoami", "sh", "-c", script, restartPolicy="Never"))
    eventually(lambda: cluster.get("pod", "whoami")["status"].get("phase") == "Succeeded", "the pod to end")
    said = cluster.kubectl("logs", "whoami")
    assert 'User "system:serviceaccount:default:default" cannot get resource "pods"' in said
    assert 'cannot list resource "secrets"' in said


@pytest.mark.parametrize(
    ("name", "container", "reason", "words"),
    [
        ("image", {"image": "registry.invalid/a:1"}, "ImagePullBackOff", "no such host (emulated"),
        ("secret", {"env": [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "gone", "key": "k"}}}]},
         "CreateContainerConfigError", 'secret "gone" not found'),
        ("command", {"command": None, "image": "some/image:1"}, "CreateContainerError", "set `command`"),
    ],
)  # fmt: skip
def test_what_keeps_a_container_from_starting(
    cluster: TestCluster, name: str, container: dict[str, object], reason: str, words: str
) -> None:
    cluster.apply(pod(name, "sleep", "60", container=container))

    def waiting() -> dict[str, str]:
        state = cluster.container(name).get("state", {}).get("waiting", {})
        return state if state.get("reason") == reason else {}

    assert words in eventually(waiting, f"reason {reason}")["message"]
    assert cluster.get("pod", name)["status"]["phase"] == "Pending"


def test_a_missing_executable_is_a_start_error(cluster: TestCluster) -> None:
    cluster.apply(pod("typo", "no-such-program", restartPolicy="Never"))
    eventually(lambda: cluster.get("pod", "typo")["status"].get("phase") == "Failed", "the pod to fail")
    ended = cluster.container("typo")["state"]["terminated"]
    assert (ended["exitCode"], ended["reason"]) == (128, "StartError")
    assert 'exec: "no-such-program": executable file not found in $PATH' in ended["message"]


def test_crash_loop_shows_reason_message_and_previous_log(cluster: TestCluster) -> None:
    code = (
        "import os\n"
        "print('about to fail')\n"
        "open(os.environ['WHERRY_TERMINATION_LOG'], 'w').write('out of luck')\n"
        "exit(3)"
    )
    cluster.apply(pod("crash", *python(code)))

    def looping() -> dict[str, object]:
        status = cluster.container("crash")
        crashed = status.get("state", {}).get("waiting", {}).get("reason") == "CrashLoopBackOff"
        return status if crashed and status["restartCount"] >= 2 else {}

    status = eventually(looping, "CrashLoopBackOff after two restarts")
    last = status["lastState"]["terminated"]
    assert (last["exitCode"], last["reason"], last["message"]) == (3, "Error", "out of luck")
    assert "about to fail" in cluster.kubectl("logs", "crash", "--previous")
    assert "BackOff" in cluster.kubectl("get", "events", "--field-selector=involvedObject.name=crash")


def test_termination_message_falls_back_to_the_log(cluster: TestCluster) -> None:
    container = {"terminationMessagePolicy": "FallbackToLogsOnError"}
    cluster.apply(pod("fallback", *python("print('the cause')\nexit(1)"), container=container, restartPolicy="Never"))
    eventually(lambda: cluster.get("pod", "fallback")["status"].get("phase") == "Failed", "the pod to fail")
    assert cluster.container("fallback")["state"]["terminated"]["message"] == "the cause\n"


def test_memory_over_the_limit_is_oom_killed(cluster: TestCluster) -> None:
    container = {"resources": {"limits": {"memory": "64Mi"}}}
    hog = "import time\nx = bytearray(200 << 20)\nfor i in range(0, len(x), 4096): x[i] = 1\ntime.sleep(60)"
    cluster.apply(pod("hog", *python(hog), container=container, restartPolicy="Never"))
    eventually(lambda: cluster.get("pod", "hog")["status"].get("phase") == "Failed", "the pod to fail")
    ended = cluster.container("hog")["state"]["terminated"]
    assert (ended["reason"], ended["exitCode"], ended["signal"]) == ("OOMKilled", 137, 9)


def test_a_failing_init_container_holds_the_pod(cluster: TestCluster) -> None:
    init = {"name": "first", "image": "none", "command": ["false"]}
    cluster.apply(pod("held", "sleep", "60", initContainers=[init]))
    eventually(lambda: cluster.container("held", "initContainerStatuses").get("restartCount", 0) >= 1, "a restart")
    status = cluster.get("pod", "held")["status"]
    assert status["phase"] == "Pending"
    assert status["containerStatuses"][0]["state"]["waiting"]["reason"] == "PodInitializing"
    assert {c["type"]: c["status"] for c in status["conditions"]}["Initialized"] == "False"


def test_probes(cluster: TestCluster, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    started = tmp_path / "started"
    container = {
        "env": [{"name": "SICK", "value": str(sick)}],
        "startupProbe": {"exec": {"command": ["test", "-e", str(started)]}, "periodSeconds": 1, "failureThreshold": 60},
        "livenessProbe": {"tcpSocket": {"port": "http"}, "periodSeconds": 1},
    }
    cluster.apply(server("probed", container=container))
    eventually(lambda: "running" in cluster.container("probed").get("state", {}), "the container to run")
    assert not cluster.container("probed")["started"]
    assert not cluster.container("probed")["ready"]
    started.touch()
    cluster.wait_ready("probed")
    sick.touch()
    eventually(lambda: not cluster.container("probed")["ready"], "the pod not to be ready")
    assert "statuscode: 503" in cluster.kubectl(
        "get", "events", "--field-selector=involvedObject.name=probed,reason=Unhealthy"
    )
    sick.unlink()
    cluster.wait_ready("probed")
    assert cluster.container("probed")["restartCount"] == 0


def test_a_failed_liveness_probe_restarts_the_container(cluster: TestCluster, tmp_path: Path) -> None:
    sick = tmp_path / "sick"
    probe = {"httpGet": {"path": "/", "port": "http"}, "periodSeconds": 1, "failureThreshold": 2}
    container = {"env": [{"name": "SICK", "value": str(sick)}], "livenessProbe": probe}
    cluster.apply(server("alive", container=container))
    cluster.wait_ready("alive")
    sick.touch()
    eventually(lambda: cluster.container("alive")["restartCount"] == 1, "a restart")
    sick.unlink()
    cluster.wait_ready("alive")
    assert "failed liveness probe, will be restarted" in cluster.kubectl("describe", "pod", "alive")


def test_readiness_gates(cluster: TestCluster) -> None:
    gate = "example.com/routable"
    cluster.apply(server("gated", readinessGates=[{"conditionType": gate}]))

    def conditions() -> dict[str, str]:
        return {c["type"]: c["status"] for c in cluster.get("pod", "gated")["status"].get("conditions", [])}

    eventually(lambda: conditions().get("ContainersReady") == "True", "the containers to be ready")
    assert conditions()["Ready"] == "False"
    patch = {"status": {"conditions": [{"type": gate, "status": "True"}]}}
    cluster.kubectl("patch", "pod", "gated", "--subresource=status", "--type=strategic", "-p", json.dumps(patch))
    cluster.wait_ready("gated")
    assert conditions()[gate] == "True"


def test_deletion_is_graceful_and_then_forced(cluster: TestCluster) -> None:
    polite = (
        "import signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('bye'), sys.exit(0)))\n"
        "print('up')\n"
        "time.sleep(99)"
    )
    stubborn = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\nprint('up')\ntime.sleep(99)"
    cluster.apply(
        pod("polite", *python(polite), terminationGracePeriodSeconds=60),
        pod("stubborn", *python(stubborn), terminationGracePeriodSeconds=1),
    )
    for name in ("polite", "stubborn"):
        eventually(lambda name=name: cluster.kubectl("logs", name, check=False) == "up\n", "the pod to run")
    follow = subprocess.Popen(cluster.command("logs", "-f", "polite"), stdout=subprocess.PIPE, text=True)
    with follow:
        assert follow.stdout is not None
        assert follow.stdout.readline() == "up\n"
        cluster.kubectl("delete", "pod", "polite", "stubborn", "--timeout=30s")
        assert follow.stdout.read() == "bye\n"
    assert "Stopping container" in cluster.kubectl("get", "events", "--field-selector=reason=Killing")


def test_what_a_process_leaves_behind_ends_with_its_container(cluster: TestCluster) -> None:
    code = (
        "import subprocess, sys\n"
        "for new in (False, True):\n"
        "    child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(300)'], start_new_session=new)\n"
        "    print(child.pid, flush=True)\n"
    )
    cluster.apply(pod("leaves", *python(code), restartPolicy="Never"))
    eventually(lambda: cluster.get("pod", "leaves")["status"].get("phase") == "Succeeded", "the pod to end")
    left = [int(line) for line in cluster.kubectl("logs", "leaves").split()]
    assert len(left) == 2
    assert not set(left) & set(cluster.processes())


def test_exec_is_refused_clearly(cluster: TestCluster) -> None:
    cluster.apply(server("closed"))
    cluster.wait_ready("closed")
    assert "exec is not possible in local mode" in cluster.kubectl("exec", "closed", "--", "ls", check=False)
    assert "connect to them directly" in cluster.kubectl("port-forward", "pod/closed", ":8000", check=False)


def test_secrets_of_volumes_and_environment_lie_nowhere_else(cluster: TestCluster) -> None:
    data = {"k": base64.b64encode(b"w9-secret-value").decode()}
    env = [{"name": "K", "valueFrom": {"secretKeyRef": {"name": "deep", "key": "k"}}}]
    cluster.apply(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "deep"}, "data": data},
        server("holds", container={"env": env}),
    )
    cluster.wait_ready("holds")
    found = subprocess.run(
        ["grep", "-rl", "--exclude-dir=etcd", "w9-secret-value", str(cluster.home.root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert found.stdout == ""
