"""The test double of a cluster is as hard to please as a real one; asked by the clients that the project and its users have."""

from __future__ import annotations

import asyncio
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import kubernetes
import kubernetes_asyncio
import kubernetes_validate
import psutil
import pytest
from double import Cluster, Node, Timing
from kubernetes.client.exceptions import ApiException

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and process file descriptors are Linux's")

IMAGE = "registry.example/chunkflow:1"
QUICK = Timing(
    schedule=0.01, create=0.01, back_off=0.05, log_lead=0.15, phase=0.05, linger=0.1, toleration=0.2, shutdown=0.3
)
FOREVER = ["sh", "-c", "echo up; while :; do sleep 0.1; done"]
POLITE = ["sh", "-c", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done"]
Api = kubernetes.client.CoreV1Api


def manifest(
    name: str,
    command: list[str] = POLITE,
    *,
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
    container: dict[str, Any] | None = None,
    **spec: Any,
) -> dict[str, Any]:
    """A pod; ``container`` and the keywords are added to its container and spec."""
    base = {"name": "base", "image": IMAGE, "command": command} | (container or {})
    metadata = {"name": name, "labels": labels or {}, "annotations": annotations or {}}
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": metadata,
        "spec": {"restartPolicy": "Never", "containers": [base]} | spec,
    }


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster with quick times; keywords as for ``Cluster``."""
    clusters: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        options = {"images": [IMAGE], "timing": QUICK} | options
        cluster = Cluster(tmp_path / str(len(clusters)) / "kubeconfig", **options)
        clusters.append(cluster.__enter__())
        return cluster

    yield make
    for cluster in clusters:
        cluster.__exit__(None, None, None)


@pytest.fixture
def cluster(start: Callable[..., Cluster]) -> Cluster:
    return start()


def api_of(cluster: Cluster) -> Api:
    client = kubernetes.config.new_client_from_config(str(cluster.kubeconfig))
    client.configuration.retries = False
    return Api(kubernetes.client.ApiClient(client.configuration))


@pytest.fixture
def api(cluster: Cluster) -> Api:
    return api_of(cluster)


def create(api: Api, *arguments: Any, **keywords: Any) -> Any:
    return api.create_namespaced_pod("default", manifest(*arguments, **keywords))


def log_of(api: Api, name: str, **options: Any) -> str:
    """As the client's own decoding gives the representation of bytes."""
    return api.read_namespaced_pod_log(name, "default", _preload_content=False, **options).data.decode()


def state(pod: dict[str, Any]) -> dict[str, Any]:
    return pod["status"]["containerStatuses"][0]["state"]


def waits_for(reason: str) -> Callable[[dict[str, Any]], bool]:
    def check(pod: dict[str, Any]) -> bool:
        statuses = pod["status"].get("containerStatuses")
        return bool(statuses) and statuses[0]["state"].get("waiting", {}).get("reason") == reason

    return check


def reasons(cluster: Cluster, name: str) -> list[str]:
    return [event["reason"] for event in cluster.events(name)]


def condition(pod: dict[str, Any], kind: str) -> dict[str, Any]:
    return next((c for c in pod["status"].get("conditions", []) if c["type"] == kind), {})


def refusal(call: Callable[[], Any]) -> tuple[int, str, str]:
    """Code, reason and message of what the API answers to a call that it must refuse."""
    with pytest.raises(ApiException) as caught:
        call()
    body = json.loads(caught.value.body)
    assert body["kind"] == "Status" and body["code"] == caught.value.status
    return caught.value.status, body["reason"], body["message"]


def test_life(cluster: Cluster, api: Api) -> None:
    created = create(api, "one", ["sh", "-c", "echo out; echo err >&2; exec sleep 0.3"])
    assert created.status.phase == "Pending" and created.metadata.uid and created.spec.node_name is None
    seen: list[dict[str, Any]] = []
    while not seen or seen[-1]["status"]["phase"] not in ("Succeeded", "Failed"):
        seen.append(cluster.pod("one") or {})
    steps = [
        (pod["status"]["phase"], next(iter(state(pod)), "") if pod["status"].get("containerStatuses") else None)
        for pod in seen
    ]
    assert list(dict.fromkeys(steps)) == [
        ("Pending", None),
        ("Pending", "waiting"),
        ("Running", "running"),
        ("Running", "terminated"),
        ("Succeeded", "terminated"),
    ]
    assert {condition(pod, "PodScheduled").get("status") for pod in seen} == {None, "True"}
    assert state(seen[-1])["terminated"] | {"startedAt": 0, "finishedAt": 0} == {
        "exitCode": 0, "reason": "Completed", "startedAt": 0, "finishedAt": 0,
    }  # fmt: skip
    assert reasons(cluster, "one") == ["Scheduled", "Pulling", "Pulled", "Created", "Started"]
    assert log_of(api, "one") == "out\nerr\n"
    for pod in {pod["metadata"]["resourceVersion"]: pod for pod in seen}.values():
        kubernetes_validate.validate(pod, "1.34", strict=True)
    assert cluster.created[0].ended - cluster.created[0].started > 0.2


def test_log_ends_before_the_status(cluster: Cluster, api: Api) -> None:
    create(api, "one", ["sh", "-c", "echo a; sleep 0.2; echo b; printf c"])
    cluster.wait("one", "Running")
    response = api.read_namespaced_pod_log("one", "default", follow=True, timestamps=True, _preload_content=False)
    lines = b"".join(response.stream()).decode().splitlines()
    assert "running" in state(cluster.pod("one") or {})
    stamps, texts = zip(*(line.split(" ") for line in lines), strict=True)
    assert texts == ("a", "b", "c") and list(stamps) == sorted(set(stamps)) and all(len(s) == 30 for s in stamps)
    assert log_of(api, "one", tail_lines=1) == "c"
    cluster.wait("one", "Succeeded")
    time.sleep(1.0)
    assert log_of(api, "one", since_seconds=1) == ""
    assert refusal(lambda: api.read_namespaced_pod_log("one", "default", container="other"))[:2] == (400, "BadRequest")


def test_failure_tells_the_end_of_its_log(cluster: Cluster, api: Api) -> None:
    script = "for i in $(seq 100); do echo line $i; done; exit 65"
    create(api, "one", ["sh", "-c", script], container={"terminationMessagePolicy": "FallbackToLogsOnError"})
    end = state(cluster.wait("one", "Failed"))["terminated"]
    assert (end["exitCode"], end["reason"]) == (65, "Error")
    assert end["message"].splitlines() == [f"line {i}" for i in range(21, 101)]
    create(api, "two", ["sh", "-c", script])
    assert "message" not in state(cluster.wait("two", "Failed"))["terminated"]
    create(api, "three", ["no-such-program"])
    end = state(cluster.wait("three", "Failed"))["terminated"]
    assert (end["exitCode"], end["reason"]) == (128, "StartError") and "not found in $PATH" in end["message"]


def test_refusals(start: Callable[..., Cluster]) -> None:
    cluster = start(quota=2)
    api = api_of(cluster)
    body = manifest("x", serviceAccountName="nobody")
    why = 'pods "x" is forbidden: error looking up service account default/nobody: serviceaccount "nobody" not found'
    assert refusal(lambda: api.create_namespaced_pod("default", body)) == (403, "Forbidden", why)
    why = 'pods "x" is forbidden: no PriorityClass with name high was found'
    assert refusal(lambda: create(api, "x", priorityClassName="high")) == (403, "Forbidden", why)
    assert refusal(lambda: api.create_namespaced_pod("other", manifest("x")))[:2] == (404, "NotFound")
    for bad in (
        manifest("Bad_Name"),
        manifest("x", labels={"a": "not a value"}),
        manifest("x", labels={"a": "v" * 64}),
        manifest("x", restartPolicy="Always"),
        manifest("x", container={"volumeMounts": [{"name": "v", "mountPath": "/v"}]}),
        manifest("x", container={"resources": {"requests": {"memory": "2Gi"}, "limits": {"memory": "1Gi"}}}),
        manifest("x", container={"resources": {"requests": {"nvidia.com/gpu": "1"}}}),
        manifest("x", container={"resources": {"limits": {"memory": "1 GB"}}}),
    ):
        assert refusal(lambda bad=bad: api.create_namespaced_pod("default", bad))[:2] == (422, "Invalid"), bad
    wrong_type = manifest("x", container={"env": [{"name": "A", "value": 1}]})
    assert refusal(lambda: api.create_namespaced_pod("default", wrong_type))[:2] == (400, "BadRequest")
    create(api, "x")
    why = 'pods "x" already exists'
    assert refusal(lambda: create(api, "x")) == (409, "AlreadyExists", why)
    create(api, "y")
    why = 'pods "z" is forbidden: exceeded quota: pods, requested: pods=1, used: pods=2, limited: pods=2'
    assert refusal(lambda: create(api, "z")) == (403, "Forbidden", why)
    assert refusal(lambda: api.read_namespaced_pod("z", "default")) == (404, "NotFound", 'pods "z" not found')
    stranger = kubernetes.client.Configuration(host=cluster.url)
    stranger.ssl_ca_cert = api.api_client.configuration.ssl_ca_cert
    stranger_api = Api(kubernetes.client.ApiClient(stranger))
    assert refusal(lambda: stranger_api.list_namespaced_pod("default"))[:2] == (401, "Unauthorized")


def test_selectors_and_patches(cluster: Cluster, api: Api) -> None:
    sleep = {"double/sleep": "60"}
    for name, labels in (("a", {"k": "1"}), ("b", {"k": "2", "done": "True"}), ("c", {})):
        create(api, name, labels=labels, annotations=sleep)

    def names(selector: str) -> str:
        return "".join(pod.metadata.name for pod in api.list_namespaced_pod("default", label_selector=selector).items)

    expected = {
        "": "abc",
        "k=1": "a",
        "k!=1": "bc",
        "!k": "c",
        "k": "ab",
        "k in (1, 2),!done": "a",
        "k notin (1)": "bc",
    }
    assert {selector: names(selector) for selector in expected} == expected
    before = int(api.read_namespaced_pod("a", "default").metadata.resource_version)
    patched = api.patch_namespaced_pod("a", "default", {"metadata": {"labels": {"done": "True", "k": None}}})
    assert patched.metadata.labels == {"done": "True"} and int(patched.metadata.resource_version) > before
    assert names("done=True") == "ab"
    new_node = {"spec": {"nodeName": "elsewhere"}}
    assert refusal(lambda: api.patch_namespaced_pod("a", "default", new_node))[:2] == (422, "Invalid")
    api.delete_collection_namespaced_pod("default", label_selector="done=True")
    for name in "ab":
        cluster.wait(name, "gone")
    assert names("") == "c"


def test_deletion_with_grace(cluster: Cluster, api: Api) -> None:
    create(api, "polite")
    create(api, "deaf", FOREVER)
    for name in ("polite", "deaf"):
        cluster.wait(name, lambda pod, name=name: "up" in cluster.log(name))
    deleted = api.delete_namespaced_pod("polite", "default")
    assert deleted.metadata.deletion_timestamp and deleted.metadata.deletion_grace_period_seconds == 30
    asked = time.monotonic()
    api.delete_namespaced_pod("deaf", "default", body=kubernetes.client.V1DeleteOptions(grace_period_seconds=1))
    last = cluster.wait("polite", "gone")
    assert last["status"]["phase"] == "Failed" and state(last)["terminated"]["exitCode"] == 7
    assert cluster.log("polite") == "up\nbye\n"
    # The shell has no handler: as process 1 it doesn't even notice.
    last = cluster.wait("deaf", "gone")
    assert time.monotonic() - asked > 1.0 and state(last)["terminated"]["exitCode"] == 137
    assert refusal(lambda: api.read_namespaced_pod_log("deaf", "default"))[0] == 404


def test_force_deletion_kills_the_whole_session(cluster: Cluster, api: Api) -> None:
    create(api, "one", ["sh", "-c", "sleep 300 & echo $!; wait"])
    cluster.wait("one", lambda pod: cluster.log("one").endswith("\n"))
    child = psutil.Process(int(cluster.log("one")))
    api.delete_namespaced_pod("one", "default", grace_period_seconds=0)
    assert cluster.pod("one") is None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    create(api, "one", ["true"])
    cluster.wait("one", "Succeeded")
    assert cluster.most_running({}) == 1


def test_eviction_by_the_api(cluster: Cluster, api: Api) -> None:
    create(api, "one")
    cluster.wait("one", lambda pod: cluster.log("one") == "up\n")
    body = kubernetes.client.V1Eviction(metadata=kubernetes.client.V1ObjectMeta(name="one"))
    api.create_namespaced_pod_eviction("one", "default", body)
    assert condition(cluster.wait("one", "gone"), "DisruptionTarget")["reason"] == "EvictionByEvictionAPI"


def test_deadline(cluster: Cluster, api: Api) -> None:
    create(api, "one", activeDeadlineSeconds=1)
    create(api, "never", container={"image": "no.such/image:1"}, activeDeadlineSeconds=1)
    pod = cluster.wait("one", "Failed")
    assert pod["status"]["reason"] == "DeadlineExceeded" and state(pod)["terminated"]["exitCode"] == 7
    assert pod["status"]["message"] == "Pod was active on the node longer than the specified deadline"
    assert cluster.wait("never", "Failed")["status"]["reason"] == "DeadlineExceeded"


EATER = "import time\ndata = bytearray(100 << 20)\nfor i in range(0, len(data), 4096): data[i] = 1\ntime.sleep(60)"


def test_memory(start: Callable[..., Cluster]) -> None:
    limits = {"resources": {"limits": {"memory": "60Mi"}}}
    parent = f"import subprocess, sys\nprint(subprocess.call([sys.executable, '-c', {EATER!r}]))\nsys.exit(75)"
    cluster, other = start(), start(child_oom=True)
    create(api_of(cluster), "one", ["python", "-c", EATER], container=limits)
    create(api_of(other), "two", ["python", "-c", parent], container=limits)
    end = state(cluster.wait("one", "Failed"))["terminated"]
    assert (end["reason"], end["exitCode"]) == ("OOMKilled", 137)
    end = state(other.wait("two", "Failed"))["terminated"]
    assert (end["reason"], end["exitCode"], other.log("two")) == ("OOMKilled", 75, "-9\n")


def test_images(cluster: Cluster, api: Api) -> None:
    create(api, "unknown", container={"image": "no.such/image:1"})
    create(api, "malformed", container={"image": "No such image"})
    cluster.set_image("later:1", "503 Service Unavailable", seconds=0.3)
    create(api, "later", ["true"], container={"image": "later:1"})
    assert 'image "no.such/image:1"' in state(cluster.wait("unknown", waits_for("ErrImagePull")))["waiting"]["message"]
    pod = cluster.wait("unknown", waits_for("ImagePullBackOff"))
    assert state(pod)["waiting"]["message"].startswith('Back-off pulling image "no.such/image:1"')
    why = refusal(lambda: api.read_namespaced_pod_log("unknown", "default"))
    assert why[0] == 400 and 'container "base" in pod "unknown" is waiting to start' in why[2]
    cluster.wait("malformed", waits_for("InvalidImageName"))
    cluster.wait("later", "Succeeded")
    # What never ran goes at once.
    api.delete_namespaced_pod("unknown", "default")
    cluster.wait("unknown", "gone", timeout=2.0)


def test_environment(cluster: Cluster, api: Api) -> None:
    cluster.add_secret("s", {"key": "hidden", "other": "x"})
    cluster.add_config_map("c", {"LEVEL": "debug"})
    env = [
        {"name": "A", "value": "1"},
        {"name": "B", "value": "$(A)/$(UNKNOWN)/$$(A)"},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "key"}}},
        {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "none", "key": "key", "optional": True}}},
        {"name": "POD", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
        {"name": "NODE", "valueFrom": {"fieldRef": {"fieldPath": "spec.nodeName"}}},
        {"name": "LABEL", "valueFrom": {"fieldRef": {"fieldPath": "metadata.labels['l']"}}},
    ]
    script = "import json, os, sys; print(json.dumps([dict(os.environ), os.getcwd(), sys.prefix, sys.argv[1:]]))"
    more = {"env": env, "envFrom": [{"configMapRef": {"name": "c"}}], "args": ["$(POD)"]}
    create(api, "one", ["python", "-c", script], labels={"l": "v"}, container=more)
    cluster.wait("one", "Succeeded")
    found, folder, prefix, arguments = json.loads(cluster.log("one"))
    expected = {"A": "1", "B": "1/$(UNKNOWN)/$(A)", "KEY": "hidden", "POD": "one", "LABEL": "v", "LEVEL": "debug"}
    assert expected.items() <= found.items() and found["NODE"] == cluster.node_of("one") and "NONE" not in found
    own = {"PATH", "LANG", "HOME", "TMPDIR", "HOSTNAME", "NODE", "LC_CTYPE"}
    assert set(found) - set(expected) <= own
    assert prefix == sys.prefix and arguments == ["one"]
    assert len({folder, found["HOME"], found["TMPDIR"]}) == 3 and not list(Path(folder).iterdir())


def test_what_is_missing_is_waited_for(cluster: Cluster, api: Api, tmp_path: Path) -> None:
    env = [{"name": "A", "valueFrom": {"secretKeyRef": {"name": "s", "key": "a"}}}]
    create(api, "env", ["true"], container={"env": env})
    path = tmp_path / "0" / "pods" / "mounts" / "s"
    mounts = {"volumeMounts": [{"name": "v", "mountPath": str(path)}]}
    volumes = [{"name": "v", "secret": {"secretName": "s"}}]
    create(api, "files", ["cat", f"{path}/a"], container=mounts, volumes=volumes)
    claimed = {"volumeMounts": [{"name": "v", "mountPath": str(tmp_path)}]}
    volumes = [{"name": "v", "persistentVolumeClaim": {"claimName": "p"}}]
    create(api, "claim", ["true"], container=claimed, volumes=volumes)
    pod = cluster.wait("env", waits_for("CreateContainerConfigError"))
    assert state(pod)["waiting"]["message"] == 'secret "s" not found'
    cluster.wait("files", lambda pod: "FailedMount" in reasons(cluster, "files"))
    assert state(cluster.wait("files", waits_for("ContainerCreating")))
    pod = cluster.wait("claim", lambda pod: "FailedScheduling" in reasons(cluster, "claim"))
    assert 'persistentvolumeclaim "p" not found' in condition(pod, "PodScheduled")["message"]
    cluster.add_secret("s", {"a": "content"})
    cluster.add_claim("p", tmp_path)
    for name in ("env", "files", "claim"):
        cluster.wait(name, "Succeeded")
    assert cluster.log("files") == "content" and not path.exists()


def test_nothing_is_left(tmp_path: Path) -> None:

    def pods() -> list[psutil.Process]:
        """Processes by where they are: another test's Airflow may be at work below this process."""
        return [found for found in psutil.process_iter(["cwd"]) if str(tmp_path) in str(found.info["cwd"])]

    left, process = [], psutil.Process()
    # The first time libraries open what they keep.
    for attempt in ("first", "second", "third"):
        with Cluster(tmp_path / attempt / "kubeconfig", images=[IMAGE], timing=QUICK) as cluster:
            api = api_of(cluster)
            for name in ("one", "two", "three"):
                create(api, name)
                cluster.wait(name, lambda pod, name=name: cluster.log(name) == "up\n")
            assert len(pods()) >= 3
            cluster.lose_node(cluster.node_of("one") or "")
            cluster.evict("two")
            api.api_client.close()
        gc.collect()
        left.append((pods(), process.children(), process.num_fds()))
    assert left[2] == left[1]
    assert not left[2][0]


def test_only_mounts_that_are_in_place(cluster: Cluster, api: Api, tmp_path: Path) -> None:
    volumes = [{"name": "v", "hostPath": {"path": str(tmp_path)}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    shm = {"name": "shm", "mountPath": "/dev/shm"}
    mounts = [{"name": "v", "mountPath": str(tmp_path)}, shm]
    create(api, "good", ["true"], container={"volumeMounts": mounts}, volumes=volumes)
    mounts = [{"name": "v", "mountPath": "/data"}, shm]
    create(api, "bad", ["true"], container={"volumeMounts": mounts}, volumes=volumes)
    cluster.wait("good", "Succeeded")
    pod = cluster.wait("bad", waits_for("CreateContainerError"))
    assert "must be mounted at its own path, not at /data" in state(pod)["waiting"]["message"]


def test_scheduling(start: Callable[..., Cluster]) -> None:
    taint = {"key": "gpu", "value": "yes", "effect": "NoSchedule"}
    cluster = start(
        nodes=[Node("small", cpu="2", gpus=0), Node("large", gpus=1, labels={"zone": "a"}, taints=(taint,))]
    )
    api = api_of(cluster)
    toleration = [{"key": "gpu", "operator": "Exists"}]
    gpu = {"resources": {"limits": {"nvidia.com/gpu": "1"}}}
    create(api, "first", container=gpu, tolerations=toleration)
    assert cluster.wait("first", "Running")["spec"]["nodeName"] == "large"
    create(api, "second", ["true"], container=gpu, tolerations=toleration)
    expected = {
        "second": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. "
        "preemption: 0/2 nodes are available: 2 No preemption victims found for incoming pod.",
        "untolerated": "0/2 nodes are available: 1 Insufficient nvidia.com/gpu, 1 node(s) had untolerated taint {gpu: yes}. "
        "preemption: 0/2 nodes are available: 1 No preemption victims found for incoming pod, "
        "1 Preemption is not helpful for scheduling.",
        "elsewhere": "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector. "
        "preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling.",
    }
    create(api, "untolerated", container=gpu)
    term = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["b"]}]}
    required = {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [term]}}
    create(api, "elsewhere", tolerations=toleration, affinity={"nodeAffinity": required})
    for name, message in expected.items():
        pod = cluster.wait(name, lambda pod: bool(condition(pod, "PodScheduled")))
        found = condition(pod, "PodScheduled")
        assert (found["status"], found["reason"], found["message"]) == ("False", "Unschedulable", message)
        assert pod["status"]["phase"] == "Pending" and reasons(cluster, name) == ["FailedScheduling"]
    create(api, "chosen", ["true"], nodeSelector={"zone": "a"}, tolerations=toleration)
    assert cluster.wait("chosen", "Succeeded")["spec"]["nodeName"] == "large"
    cluster.delete_pod("first")
    cluster.wait("second", "Succeeded")


def test_evicted_by_the_kubelet(cluster: Cluster, api: Api) -> None:
    for name in ("full", "bare"):
        create(api, name, FOREVER)
        cluster.wait(name, "Running")
    cluster.evict("full")
    cluster.evict("bare", disruption_target=False, container_statuses=False)
    pod = cluster.wait("full", "Failed")
    assert pod["status"]["reason"] == "Evicted" and state(pod)["terminated"]["exitCode"] == 137
    assert pod["status"]["message"].startswith("The node was low on resource: memory.")
    assert condition(pod, "DisruptionTarget")["reason"] == "TerminationByKubelet"
    assert refusal(lambda: api.read_namespaced_pod_log("full", "default"))[0] == 500
    pod = cluster.wait("bare", "Failed")
    assert not condition(pod, "DisruptionTarget") and "containerStatuses" not in pod["status"]
    assert refusal(lambda: api.read_namespaced_pod_log("bare", "default"))[0] == 400
    kubernetes_validate.validate(pod, "1.34", strict=True)


def test_preempted_and_killed(cluster: Cluster, api: Api) -> None:
    for name in ("preempted", "killed"):
        create(api, name)
        cluster.wait(name, lambda pod, name=name: cluster.log(name) == "up\n")
    cluster.preempt("preempted")
    last = cluster.wait("preempted", "gone")
    assert condition(last, "DisruptionTarget")["reason"] == "PreemptionByScheduler"
    assert last["metadata"]["deletionTimestamp"]
    cluster.kill("killed", signal.SIGUSR1)
    cluster.kill("killed", signal.SIGKILL)
    assert state(cluster.wait("killed", "Failed"))["terminated"]["exitCode"] == 137


def test_node_shutdown(cluster: Cluster, api: Api) -> None:
    create(api, "one")
    cluster.wait("one", lambda pod: cluster.log("one") == "up\n")
    cluster.shutdown_node(cluster.node_of("one") or "")
    pod = cluster.wait("one", "Failed")
    assert pod["status"]["reason"] == "Terminated" and state(pod)["terminated"]["exitCode"] == 7
    assert pod["status"]["message"] == "Pod was terminated in response to imminent node shutdown."
    assert condition(pod, "DisruptionTarget")["reason"] == "TerminationByKubelet"


def test_node_loss(cluster: Cluster, api: Api) -> None:
    for name in ("one", "two"):
        create(api, name, FOREVER)
        cluster.wait(name, lambda pod, name=name: cluster.log(name) == "up\n")
        for other in {"node-a", "node-b"} - {cluster.node_of("one")}:
            cluster.shutdown_node(other)
    assert cluster.node_of("one") == cluster.node_of("two")
    node = cluster.node_of("one") or ""
    following = api.read_namespaced_pod_log("one", "default", follow=True, _preload_content=False)
    cluster.lose_node(node)
    with pytest.raises(Exception, match=r"(?i)connection broken|incomplete|prematurely"):
        b"".join(following.stream())
    pod = cluster.pod("one") or {}
    assert pod["status"]["phase"] == "Running" and condition(pod, "Ready")["status"] == "False"
    code, _, why = refusal(lambda: api.read_namespaced_pod_log("one", "default"))
    assert code == 500 and why.startswith('Get "https://') and why.endswith("connect: no route to host")
    pod = cluster.wait("one", lambda pod: "deletionTimestamp" in pod["metadata"])
    assert condition(pod, "DisruptionTarget")["reason"] == "DeletionByTaintManager"
    assert pod["status"]["phase"] == "Running" and "running" in state(pod)
    api.delete_namespaced_pod("one", "default")
    assert cluster.pod("one") is not None
    api.delete_namespaced_pod("one", "default", grace_period_seconds=0)
    assert cluster.pod("one") is None
    cluster.node_back(node)
    assert state(cluster.wait("two", "gone"))["terminated"]["exitCode"] == 255


def test_rules(cluster: Cluster, api: Api) -> None:
    script = ["sh", "-c", "echo start; echo half way; sleep 60"]
    rule = cluster.add_rule("log contains half way", "evict", {"app": "infer"}, disruption_target=False)
    gone: list[str] = []
    cluster.add_rule("gone", gone.append, "^t", times=5)
    create(api, "other", script)
    create(api, "one", script, labels={"app": "infer"})
    assert cluster.wait("one", "Failed")["status"]["reason"] == "Evicted"
    create(api, "two", script, labels={"app": "infer"})
    cluster.wait("two", lambda pod: "half" in cluster.log("two"))
    assert rule.pods == ["one"] and (cluster.pod("two") or {})["status"]["phase"] == "Running"
    cluster.delete_pod("two", grace=0)
    cluster.delete_pod("one")
    cluster.wait("one", "gone")
    assert gone == ["two"]
    with pytest.raises(ValueError, match="expected 'log contains TEXT'"):
        cluster.add_rule("sometimes", "evict")


def test_faults(cluster: Cluster, api: Api) -> None:
    cluster.add_fault("POST", "/pods$", lost_response=True)
    with pytest.raises(Exception, match=r"(?i)connection"):
        create(api, "one")
    assert api.read_namespaced_pod("one", "default").metadata.name == "one"
    cluster.add_fault("GET", "/pods/one$", cut=True)
    with pytest.raises(Exception, match=r"(?i)connection"):
        api.read_namespaced_pod("one", "default")
    fault = cluster.add_fault("GET", "/log$", status=500, times=2)
    cluster.wait("one", "Running")
    for _ in range(2):
        assert refusal(lambda: api.read_namespaced_pod_log("one", "default"))[:2] == (500, "InternalError")
    assert api.read_namespaced_pod_log("one", "default") is not None and fault.left == 0
    cluster.add_fault("*", "", delay=0.3)
    before = time.monotonic()
    api.read_namespaced_pod("one", "default")
    assert time.monotonic() - before >= 0.3
    assert [r.method for r in cluster.requests][:2] == ["POST", "GET"]


def test_api_away(cluster: Cluster, api: Api) -> None:
    create(api, "one", ["sh", "-c", "sleep 0.5; echo done"])
    port = cluster.port
    cluster.pause()
    with pytest.raises(Exception, match=r"(?i)refused|aborted|reset"):
        api.read_namespaced_pod("one", "default")
    with pytest.raises(Exception, match=r"(?i)refused"):
        api_of(cluster).read_namespaced_pod("one", "default")
    cluster.wait("one", "Succeeded")
    cluster.resume()
    assert cluster.port == port and api.read_namespaced_pod("one", "default").status.phase == "Succeeded"


def test_log_rotation(start: Callable[..., Cluster]) -> None:
    cluster = start(log_limit_bytes=100)
    api = api_of(cluster)
    create(api, "one", ["sh", "-c", "for i in $(seq 1000); do echo line $i; done"])
    cluster.wait("one", "Succeeded")
    lines = log_of(api, "one").splitlines()
    assert lines[-1] == "line 1000" and len(lines) == 11


def test_asynchronous_client(cluster: Cluster, api: Api) -> None:
    async def use() -> None:
        configuration = kubernetes_asyncio.client.Configuration()
        await kubernetes_asyncio.config.load_kube_config(str(cluster.kubeconfig), client_configuration=configuration)
        async with kubernetes_asyncio.client.ApiClient(configuration) as client:
            core = kubernetes_asyncio.client.CoreV1Api(client)
            await core.create_namespaced_pod("default", manifest("one"))
            while (await core.read_namespaced_pod("one", "default")).status.phase != "Running":
                await asyncio.sleep(0.02)
            selector = "involvedObject.name=one"
            events = await core.list_namespaced_event(
                "default", field_selector=selector, resource_version_match="NotOlderThan", resource_version="0"
            )
            assert [event.reason for event in events.items][-1] == "Started"
            seen = []
            watch = kubernetes_asyncio.watch.Watch()
            version = events.metadata.resource_version
            await core.delete_namespaced_pod("one", "default")
            async with watch.stream(
                core.list_namespaced_event,
                "default",
                field_selector=selector,
                resource_version=version,
                timeout_seconds=1,
            ) as stream:
                async for event in stream:
                    seen.append(event["object"].reason)
            assert seen == ["Killing"]
            log = await core.read_namespaced_pod_log("one", "default") if cluster.pod("one") else "up\nbye\n"
            assert log.startswith("up\n")

    asyncio.run(use())


def kubectl(cluster: Cluster, *arguments: str, content: str | None = None) -> str:
    program = Path(sys.executable).with_name("kubectl")
    environment = {"KUBECONFIG": str(cluster.kubeconfig), "HOME": str(cluster.kubeconfig.parent), "PATH": os.defpath}
    done = subprocess.run(
        [program, *arguments], env=environment, input=content, capture_output=True, text=True, timeout=20
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_kubectl(cluster: Cluster) -> None:
    body = json.dumps(manifest("one", ["sh", "-c", "trap 'exit 0' TERM; echo hello; while :; do sleep 0.05; done"]))
    assert kubectl(cluster, "create", "--validate=false", "-f", "-", content=body) == "pod/one created\n"
    cluster.wait("one", lambda pod: cluster.log("one") == "hello\n")
    assert kubectl(cluster, "get", "pods").splitlines()[1].startswith("one ")
    assert json.loads(kubectl(cluster, "get", "pod", "one", "-o", "json"))["status"]["phase"] == "Running"
    assert kubectl(cluster, "logs", "one") == "hello\n"
    kubectl(cluster, "wait", "--for=condition=Ready", "pod/one")
    kubectl(cluster, "label", "pod", "one", "a=b")
    assert kubectl(cluster, "get", "pods", "-l", "a=b", "-o", "name") == "pod/one\n"
    assert '"one" deleted' in kubectl(cluster, "delete", "pod", "one")
    assert cluster.pod("one") is None
    kubectl(cluster, "run", "two", f"--image={IMAGE}", "--restart=Never", "--command", "--", "sleep", "300")
    cluster.wait("two", "Running")
    kubectl(cluster, "delete", "pod", "two", "--grace-period=0", "--force")
    assert cluster.pod("two") is None


@pytest.mark.long
def test_many_pods(cluster: Cluster, api: Api) -> None:
    count, few = 500, 100
    began = time.process_time()
    for number in range(count):
        labels = {"try": str(number // 2)}
        create(api, f"pod-{number}", labels=labels, annotations={"double/sleep": "1"})
        if number + 1 == few:
            of_few = time.process_time() - began
    last = cluster.wait(f"pod-{count - 1}", "Succeeded", timeout=60)
    assert len(api.list_namespaced_pod("default", label_selector="try").items) == count
    assert last["status"]["phase"] == "Succeeded" and cluster.log("pod-0") == "simulated: asleep for 1.0 s\n"
    assert cluster.most_running({"try": "3"}) == 2 and cluster.most_running({"try": "none"}) == 0
    assert {pod["spec"]["nodeName"] for pod in cluster.pods()} == {"node-a", "node-b"}
    # Nothing may cost more the more pods there are; this is both ends of it.
    assert time.process_time() - began < 3 * count / few * of_few


def test_pods_end_with_the_cluster(tmp_path: Path) -> None:
    # The child of the main process is the harder one to end. A request by hand, not by a client that imports for seconds.
    body = json.dumps(manifest("one", ["sh", "-c", "sleep 300 & echo $!; wait"], container={"image": "i:1"}))
    script = f"""
import ssl, sys, urllib.request
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from double import Cluster
with Cluster(Path({str(tmp_path)!r}) / sys.argv[1] / "kubeconfig", images=["i:1"]) as cluster:
    headers = {{"Authorization": f"Bearer {{cluster.token}}", "Content-Type": "application/json"}}
    path = "/api/v1/namespaces/default/pods"
    request = urllib.request.Request(cluster.url + path, {body!r}.encode(), headers)
    urllib.request.urlopen(request, context=ssl._create_unverified_context()).close()
    cluster.wait("one", lambda pod: cluster.log("one"))
    print(cluster.log("one"), flush=True)
    sys.stdin.read()
"""
    processes = {
        how: subprocess.Popen(
            [sys.executable, "-c", script, how], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for how in ("killed", "closed")
    }
    for how, process in processes.items():
        assert process.stdout is not None
        pod = psutil.Process(int(process.stdout.readline()))
        if how == "killed":
            process.kill()
        process.communicate()
        psutil.wait_procs([pod], timeout=5)
        assert not pod.is_running() or pod.status() == psutil.STATUS_ZOMBIE, how


def test_callers_in_many_threads(cluster: Cluster) -> None:
    problems: list[BaseException] = []
    # Made one by one: the client's reading of a kubeconfig is not for threads (certificates in temporary files that others find
    # before they are written).
    apis = [api_of(cluster) for _ in range(8)]

    def work(number: int) -> None:
        try:
            mine = apis[number]
            create(mine, f"pod-{number}", ["sh", "-c", "echo one; sleep 0.1; echo two"])
            cluster.wait(f"pod-{number}", "Running")
            text = log_of(mine, f"pod-{number}", follow=True)
            assert text == "one\ntwo\n"
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=[number]) for number in range(len(apis))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems
