"""Pods of the double live as on a real cluster: scheduled, prepared, run, and shown by the API."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
from kubernetes.client import CoreV1Api

from tests.support.cluster.client import (
    FOREVER,
    api_of,
    condition,
    create,
    log_of,
    reasons,
    refusal,
    state,
    waits_for,
)
from tests.support.cluster.double import Cluster, Node

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and process file descriptors are Linux's")


def test_life(cluster: Cluster, api: CoreV1Api) -> None:
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
    end = state(seen[-1])["terminated"]
    assert set(end) == {"exitCode", "reason", "startedAt", "finishedAt", "containerID"}
    assert (end["exitCode"], end["reason"]) == (0, "Completed")
    assert reasons(cluster, "one") == ["Scheduled", "Pulling", "Pulled", "Created", "Started"]
    assert log_of(api, "one") == "out\nerr\n"
    for pod in {pod["metadata"]["resourceVersion"]: pod for pod in seen}.values():
        kubernetes_validate.validate(pod, "1.34", strict=True)
    started, ended = cluster.created[0].started, cluster.created[0].ended
    assert started and ended and ended - started > 0.2


def test_events_of_a_second_come_in_any_order(cluster: Cluster, api: CoreV1Api) -> None:
    names = [f"pod-{number}" for number in range(6)]
    for name in names:
        create(api, name, annotations={"double/sleep": "0"})
    for name in names:
        cluster.wait(name, "Succeeded")
    told = {name: reasons(cluster, name) for name in names}
    assert set(map(tuple, told.values())) == {("Scheduled", "Pulling", "Pulled", "Created", "Started")}
    listed = {}
    for name in names:
        events = api.list_namespaced_event("default", field_selector=f"involvedObject.name={name}").items
        times = [event.first_timestamp for event in events]
        assert times == sorted(times)
        listed[name] = [event.reason for event in events]
    assert all(sorted(listed[name]) == sorted(told[name]) for name in names) and listed != told


def test_log_ends_before_the_status(cluster: Cluster, api: CoreV1Api) -> None:
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


def test_failure_tells_the_end_of_its_log(cluster: Cluster, api: CoreV1Api) -> None:
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


def test_log_rotation(start: Callable[..., Cluster]) -> None:
    cluster = start(log_limit_bytes=100)
    api = api_of(cluster)
    create(api, "one", ["sh", "-c", "for i in $(seq 1000); do echo line $i; done"])
    cluster.wait("one", "Succeeded")
    lines = log_of(api, "one").splitlines()
    assert lines[-1] == "line 1000" and len(lines) == 11


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
        "second": "0/2 nodes are available: 2 Insufficient nvidia.com/gpu. no new claims to deallocate, "
        "preemption: 0/2 nodes are available: 1 No preemption victims found for incoming pod, "
        "1 Preemption is not helpful for scheduling.",
        "untolerated": "0/2 nodes are available: 1 Insufficient nvidia.com/gpu, "
        "1 node(s) had untolerated taint(s). no new claims to deallocate, "
        "preemption: 0/2 nodes are available: 2 Preemption is not helpful for scheduling.",
        "elsewhere": "0/2 nodes are available: 2 node(s) didn't match Pod's node affinity/selector. "
        "no new claims to deallocate, "
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


def test_preferred_nodes(start: Callable[..., Cluster]) -> None:
    cluster = start(nodes=[Node(name, cpu="4", labels={"zone": name[0]}) for name in ("a1", "a2", "b1")])
    api = api_of(cluster)

    def place(name: str, preferred: Mapping[int, dict[str, Any]], required: dict[str, Any] | None = None) -> str | None:
        terms = [{"weight": weight, "preference": term} for weight, term in preferred.items()]
        affinity: dict[str, Any] = {"preferredDuringSchedulingIgnoredDuringExecution": terms}
        if required:
            affinity["requiredDuringSchedulingIgnoredDuringExecution"] = {"nodeSelectorTerms": [required]}
        request = {"resources": {"requests": {"cpu": "2"}}}
        create(api, name, FOREVER, container=request, affinity={"nodeAffinity": affinity})
        cluster.wait(name, lambda pod: bool(condition(pod, "PodScheduled")))
        return cluster.node_of(name)

    def unlike(*names: str) -> dict[str, Any]:
        return {"matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": list(names)}]}

    zone_a = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
    # Against the emptiest node, and each in the order that would be wrong without it.
    assert place("one", {10: unlike("a1", "a2")}) == "b1"
    assert place("two", {10: unlike("a1"), 1: zone_a}) == "a2"
    # The weights add up.
    assert place("three", {10: unlike("a1"), 30: zone_a}) == "a2"
    # What is preferred is only that: where all else is full, an avoided node will do.
    assert place("four", {10: unlike("a1", "a2")}) == "b1"
    assert place("five", {100: unlike("a1")}) == "a1"
    # What is required is more.
    assert place("six", {}, unlike("a1")) is None
    expected = "0/3 nodes are available: 1 node(s) didn't match Pod's node affinity/selector, 2 Insufficient cpu."
    assert condition(cluster.pod("six") or {}, "PodScheduled")["message"].startswith(expected)
    assert place("seven", {}, unlike("a2", "b1")) == "a1"


def test_images(cluster: Cluster, api: CoreV1Api) -> None:
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


def test_environment(cluster: Cluster, api: CoreV1Api) -> None:
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


def test_what_is_missing_is_waited_for(cluster: Cluster, api: CoreV1Api, tmp_path: Path) -> None:
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


def test_only_mounts_that_are_in_place(cluster: Cluster, api: CoreV1Api, tmp_path: Path) -> None:
    volumes = [{"name": "v", "hostPath": {"path": str(tmp_path)}}, {"name": "shm", "emptyDir": {"medium": "Memory"}}]
    shm = {"name": "shm", "mountPath": "/dev/shm"}
    mounts = [{"name": "v", "mountPath": str(tmp_path)}, shm]
    create(api, "good", ["true"], container={"volumeMounts": mounts}, volumes=volumes)
    mounts = [{"name": "v", "mountPath": "/data"}, shm]
    create(api, "bad", ["true"], container={"volumeMounts": mounts}, volumes=volumes)
    cluster.wait("good", "Succeeded")
    pod = cluster.wait("bad", waits_for("CreateContainerError"))
    assert "must be mounted at its own path, not at /data" in state(pod)["waiting"]["message"]


def test_rules(cluster: Cluster, api: CoreV1Api) -> None:
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
