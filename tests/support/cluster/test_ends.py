"""Pods of the double end as on a real cluster, and leave nothing behind."""

from __future__ import annotations

import gc
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import kubernetes
import kubernetes_validate
import psutil
import pytest
from kubernetes.client import CoreV1Api

from tests.support.airflow.volumes import until
from tests.support.cluster.client import (
    FOREVER,
    IMAGE,
    POLITE,
    QUICK,
    api_of,
    condition,
    create,
    log_of,
    manifest,
    reasons,
    refusal,
    state,
    wait_for_log,
)
from tests.support.cluster.double import Cluster
from tests.support.cluster.images import NO_GPU_DRIVER

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and process file descriptors are Linux's")


def test_deletion_with_grace(cluster: Cluster, api: CoreV1Api) -> None:
    create(api, "polite")
    create(api, "deaf", FOREVER)
    for name in ("polite", "deaf"):
        wait_for_log(cluster, name, "up\n")
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


def test_force_deletion_kills_the_whole_session(cluster: Cluster, api: CoreV1Api) -> None:
    create(api, "one", ["sh", "-c", "sleep 300 & echo $!; wait"])
    cluster.wait("one", lambda pod: cluster.log("one").endswith("\n"))
    child = psutil.Process(int(cluster.log("one")))
    api.delete_namespaced_pod("one", "default", grace_period_seconds=0)
    assert cluster.pod("one") is None
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE
    create(api, "one", ["true"])
    cluster.wait("one", "Succeeded")
    assert cluster.most_running({}) == 1


def test_eviction_by_the_api(cluster: Cluster, api: CoreV1Api) -> None:
    create(api, "one")
    wait_for_log(cluster, "one", "up\n")
    body = kubernetes.client.V1Eviction(metadata=kubernetes.client.V1ObjectMeta(name="one"))
    api.create_namespaced_pod_eviction("one", "default", body)
    assert condition(cluster.wait("one", "gone"), "DisruptionTarget")["reason"] == "EvictionByEvictionAPI"


def test_deadline(cluster: Cluster, api: CoreV1Api) -> None:
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


def test_evicted_by_the_kubelet(cluster: Cluster, api: CoreV1Api) -> None:
    for name, command in (("polite", POLITE), ("deaf", FOREVER), ("lost", POLITE)):
        create(api, name, command)
        wait_for_log(cluster, name, "up\n")
    cluster.evict("polite")
    cluster.evict("deaf", log=False)
    cluster.evict("lost", disruption_target=False, container_statuses=False)
    pod = cluster.wait("polite", "Failed")
    assert pod["status"]["reason"] == "Evicted" and state(pod)["terminated"]["exitCode"] == 7
    assert pod["status"]["message"].startswith("The node was low on resource: memory.")
    assert condition(pod, "DisruptionTarget")["reason"] == "TerminationByKubelet"
    assert log_of(api, "polite") == "up\nbye\n"
    assert state(cluster.wait("deaf", "Failed"))["terminated"]["exitCode"] == 137
    code, _, why = refusal(lambda: api.read_namespaced_pod_log("deaf", "default"))
    assert code == 500 and why.startswith("unable to retrieve container logs for containerd://")
    pod = cluster.wait("lost", "Failed")
    end = state(pod)["terminated"]
    assert (end["reason"], end["exitCode"]) == ("ContainerStatusUnknown", 137)
    assert not condition(pod, "DisruptionTarget")
    code, _, why = refusal(lambda: api.read_namespaced_pod_log("lost", "default"))
    assert (code, why) == (400, 'container "base" in pod "lost" is terminated')
    kubernetes_validate.validate(pod, "1.34", strict=True)


def test_preempted_and_killed(cluster: Cluster, api: CoreV1Api) -> None:
    for name in ("preempted", "killed"):
        create(api, name)
        wait_for_log(cluster, name, "up\n")
    cluster.preempt("preempted")
    last = cluster.wait("preempted", "gone")
    assert condition(last, "DisruptionTarget")["reason"] == "PreemptionByScheduler"
    assert last["metadata"]["deletionTimestamp"]
    cluster.kill("killed", signal.SIGUSR1)
    cluster.kill("killed", signal.SIGKILL)
    assert state(cluster.wait("killed", "Failed"))["terminated"]["exitCode"] == 137


def test_node_shutdown(cluster: Cluster, api: CoreV1Api) -> None:
    create(api, "one")
    wait_for_log(cluster, "one", "up\n")
    cluster.shutdown_node(cluster.node_of("one") or "")
    pod = cluster.wait("one", "Failed")
    assert pod["status"]["reason"] == "Terminated" and state(pod)["terminated"]["exitCode"] == 7
    assert pod["status"]["message"] == "Pod was terminated in response to imminent node shutdown."
    assert condition(pod, "DisruptionTarget")["reason"] == "TerminationByKubelet"


def test_node_loss(cluster: Cluster, api: CoreV1Api) -> None:
    for name in ("one", "two"):
        create(api, name, FOREVER)
        wait_for_log(cluster, name, "up\n")
        for other in {"node-a", "node-b"} - {cluster.node_of("one")}:
            cluster.shutdown_node(other)
    assert cluster.node_of("one") == cluster.node_of("two")
    node = cluster.node_of("one") or ""
    following = api.read_namespaced_pod_log("one", "default", follow=True, _preload_content=False)
    cluster.lose_node(node)
    with pytest.raises(Exception, match=r"(?i)connection broken|incomplete|prematurely"):
        b"".join(following.stream())
    # Nobody knows at first, and a pod may still be sent there.
    assert condition(cluster.pod("one") or {}, "Ready")["status"] == "True"
    asked = time.monotonic()
    code, _, why = refusal(lambda: api.read_namespaced_pod_log("one", "default"))
    assert code == 500 and why.startswith('Get "https://10.0.0.') and why.endswith(":10250: i/o timeout")
    assert time.monotonic() - asked > QUICK.lost_log
    pod = cluster.wait("one", lambda pod: condition(pod, "Ready")["status"] == "False")
    assert not {"reason", "message"} & set(condition(pod, "Ready")) and pod["status"]["phase"] == "Running"
    pod = cluster.wait("one", lambda pod: "deletionTimestamp" in pod["metadata"])
    assert condition(pod, "DisruptionTarget")["reason"] == "DeletionByTaintManager"
    assert pod["status"]["phase"] == "Running" and "running" in state(pod)
    api.delete_namespaced_pod("one", "default")
    assert cluster.pod("one") is not None
    api.delete_namespaced_pod("one", "default", grace_period_seconds=0)
    assert cluster.pod("one") is None
    cluster.node_back(node)
    assert state(cluster.wait("two", "gone"))["terminated"]["exitCode"] == 255


def has_written(cluster: Cluster, name: str, text: str) -> bool:
    return text in cluster.log(name)


def test_a_node_that_is_cut_off_and_lives(cluster: Cluster, api: CoreV1Api) -> None:
    """Deleted without grace, its pod is unknown to the API, and works on until the node is back."""
    names = ("forgotten", "terminating", "untouched")
    script = ["sh", "-c", "trap 'echo bye; exit 7' TERM; while :; do sleep 0.05; echo on; done"]
    for name in names:
        create(api, name, script)
        until(partial(has_written, cluster, name, "on"), 20)
        for other in {"node-a", "node-b"} - {cluster.node_of("forgotten")}:
            cluster.shutdown_node(other)
    node = cluster.node_of("forgotten") or ""
    assert {cluster.node_of(name) for name in names} == {node}
    cluster.lose_node(node, alive=True)
    for name in names:
        cluster.wait(name, lambda pod: condition(pod, "Ready")["status"] == "False")
    assert refusal(lambda: api.read_namespaced_pod_log("forgotten", "default"))[0] == 500
    pod = cluster.wait("forgotten", lambda pod: "deletionTimestamp" in pod["metadata"])
    assert condition(pod, "DisruptionTarget")["reason"] == "DeletionByTaintManager"
    assert pod["status"]["phase"] == "Running" and "running" in state(pod)
    api.delete_namespaced_pod("forgotten", "default", grace_period_seconds=0)
    assert cluster.pod("forgotten") is None

    def goes_on(name: str) -> None:
        written = len(cluster.log(name))
        until(lambda: len(cluster.log(name)) > written + 30, 20)

    for name in ("forgotten", "terminating"):
        goes_on(name)
    for other in {"node-a", "node-b"} - {node}:
        cluster.node_back(other)
    create(api, "forgotten", script, labels={"next": "one"})
    cluster.wait("forgotten", "Running")
    assert cluster.most_running({}) == 4
    cluster.node_back(node)
    last = cluster.wait("terminating", "gone")
    assert state(last)["terminated"]["exitCode"] == 7
    until(lambda: [pod.text.count("bye\n") for pod in cluster.created] == [1, 1, 1, 0], 20)


def test_a_node_that_is_back_before_anybody_gives_it_up(cluster: Cluster, api: CoreV1Api) -> None:
    create(api, "one")
    wait_for_log(cluster, "one", "up\n")
    cluster.lose_node(cluster.node_of("one") or "", alive=True)
    cluster.wait("one", lambda pod: condition(pod, "Ready")["status"] == "False")
    cluster.node_back(cluster.node_of("one") or "")
    pod = cluster.wait("one", lambda pod: condition(pod, "Ready")["status"] == "True")
    assert pod["status"]["phase"] == "Running" and log_of(api, "one") == "up\n"
    api.delete_namespaced_pod("one", "default")
    assert state(cluster.wait("one", "gone"))["terminated"]["exitCode"] == 7


def test_kubelet_restart(cluster: Cluster, api: CoreV1Api) -> None:
    create(api, "one")
    wait_for_log(cluster, "one", "up\n")
    following = api.read_namespaced_pod_log("one", "default", follow=True, _preload_content=False)
    cluster.restart_kubelet(cluster.node_of("one") or "", 1.0)
    with pytest.raises(Exception, match=r"(?i)connection broken|incomplete|prematurely"):
        b"".join(following.stream())
    code, _, why = refusal(lambda: api.read_namespaced_pod_log("one", "default"))
    assert code == 500 and why.endswith(":10250: connect: connection refused")
    # It ends once there is somebody to end it.
    cluster.delete_pod("one", grace=5)
    assert cluster.log("one") == "up\n"
    assert state(cluster.wait("one", "gone"))["terminated"]["exitCode"] == 7


def test_a_node_that_starts_nothing(cluster: Cluster, api: CoreV1Api) -> None:
    for node in ("node-a", "node-b"):
        cluster.break_node(node, NO_GPU_DRIVER)
    create(api, "one")
    pod = cluster.wait("one", "Failed")
    end = state(pod)["terminated"]
    assert (end["exitCode"], end["reason"], end["message"]) == (128, "StartError", NO_GPU_DRIVER)
    assert log_of(api, "one") == ""
    cluster.node_back(pod["spec"]["nodeName"])
    create(api, "two", ["true"], nodeName=pod["spec"]["nodeName"])
    cluster.wait("two", "Succeeded")
    # Nobody looked for a node.
    assert reasons(cluster, "two") == ["Pulling", "Pulled", "Created", "Started"]


def test_no_nodes_after_an_outage_of_the_api(cluster: Cluster, api: CoreV1Api) -> None:
    cluster.pause()
    cluster.resume(nodes_not_ready=0.5)
    create(api, "one", ["true"])
    pod = cluster.wait("one", lambda pod: bool(condition(pod, "PodScheduled")))
    assert condition(pod, "PodScheduled")["message"].startswith(
        "0/2 nodes are available: 2 node(s) had untolerated taint(s). no new claims to deallocate, "
    )
    cluster.wait("one", "Succeeded")


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
                wait_for_log(cluster, name, "up\n")
            assert len(pods()) >= 3
            cluster.lose_node(cluster.node_of("one") or "")
            cluster.evict("two")
            api.api_client.close()
        gc.collect()
        left.append((pods(), process.children(), process.num_fds()))
    assert left[2] == left[1]
    assert not left[2][0]


def test_pods_end_with_the_cluster(tmp_path: Path) -> None:
    # The child of the main process is the harder one to end. A request by hand, not by a client
    # that imports for seconds.
    body = json.dumps(manifest("one", ["sh", "-c", "sleep 300 & echo $!; wait"], container={"image": "i:1"}))
    script = f"""
import ssl, sys, urllib.request
sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from tests.support.cluster.double import Cluster
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
