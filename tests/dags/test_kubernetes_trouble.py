"""A real Airflow, a cluster, and what goes wrong between them: watchers that die, pods that can't start, an API that fails.

On the double by default; with ``-m cluster`` on a real cluster (``tests/README.md``).
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from airflow_volumes import until
from clusters import why_no_real_cluster
from kubernetes_world import ONE_BLOCK, World
from service_runs import asked
from volume import SHAPE

from operators.processes import tree, with_variable

pytestmark = pytest.mark.airflow


@pytest.mark.parametrize(
    "component", ["triggerer", *(pytest.param(other, marks=pytest.mark.long) for other in ("task", "scheduler"))]
)
def test_a_pod_outlives_what_watches_it(world: World, component: str) -> None:
    """Whatever is killed while a pod runs, the next process goes on with the same pod, and its log is complete."""
    name, deferrable, task = f"orphaned-by-{component}", component == "triggerer", "infer.0_0_0"
    world.add(name, {task: ["count"]}, shape=ONE_BLOCK, deferrable=deferrable)
    run = world.volumes.trigger(name)
    tries = 1 if deferrable else 2

    def looks(attempt: int) -> int:
        """How many processes have seen the pod at work in this try."""
        log = world.volumes.log(name, run, task, attempt)
        return sum(log.count(f"pod {pod}: running") for pod in running(world, name))

    def at_work() -> bool:
        """Whether the pod works and is watched; only the log of a try that has begun can be read."""
        begun = world.volumes.tasks(name, run)[task]["try_number"] == 1
        return begun and looks(1) == 1 and counts(world, name)

    until(at_work, world.cluster.limit)

    for process in processes(world, component, world.volumes.tasks(name, run)[task]["id"]):
        process.kill()

    until(lambda: world.volumes.tasks(name, run)[task]["try_number"] == tries, world.cluster.limit)
    # The next process says so in the log of the same try, or of its own.
    until(lambda: looks(tries) == (2 if tries == 1 else 1), world.cluster.limit)
    world.let_go(name, task)
    assert world.volumes.wait(name, run, world.cluster.limit) == "success"
    if world.cluster.double:
        assert len(world.pods_of(name, task)) == 1
    assert world.volumes.tasks(name, run)[task]["try_number"] == tries
    log = world.volumes.log(name, run, task, tries)
    check_counting(log, more_than=3)
    assert log.count("patches inferred") == 1
    world.check_no_pod_left(name)


def counts(world: World, volume: str) -> bool:
    """Whether a pod of the volume has counted to three."""
    return any("counting 3" in world.cluster.log(pod) for pod in running(world, volume))


def check_counting(log: str, more_than: int) -> None:
    """A task's log has each line of a pod that counted, once."""
    (counted,) = re.findall(r"\[pod\] counted (\d+)", log)
    assert int(counted) > more_than
    assert re.findall(r"\[pod\] counting (\d+)", log) == [str(line) for line in range(int(counted))]


def running(world: World, volume: str) -> list[str]:
    return [pod["metadata"]["name"] for pod in world.cluster.pods(volume) if pod["status"].get("phase") == "Running"]


def processes(world: World, component: str, task: str) -> list[psutil.Process]:
    """The processes of a component of Airflow; of ``task``, the one that runs the task of this id."""
    home = str(world.volumes.folder.parent / "home")
    name = "scheduler" if component == "task" else component
    ours = called(f"airflow {name}", with_variable("CHUNKFLOW_AIRFLOW_SUPERVISED", home))
    if component == "task":
        # A task's process writes its title over its environment.
        below = [child for process in ours for child in tree(process)[1:]]
        ours = called(f"airflow worker -- {task}", below)
    assert ours
    return ours


def called(title: str, found: list[psutil.Process]) -> list[psutil.Process]:
    """The processes that have this in their command line."""
    return [process for process, line in asked(found, psutil.Process.cmdline) if title in " ".join(line)]


PATIENCE = 2 if why_no_real_cluster() else 45
"""Seconds. A real node takes some to say why a container can't be made."""

UNSTARTABLE: dict[str, tuple[dict[str, Any], str]] = {
    # volume: (runner, what the failed task says)
    "no-such-image": (
        {"image": "chunkflow.invalid/nothing:1", "start_timeout": PATIENCE},
        r"image can't be run \(.*\): (Err)?ImagePull\w*: .*check runner.image",
    ),
    "no-such-node": (
        {
            "infer": {"cpu": 0.1, "memory": "64Mi", "gpu": 0, "node_selector": {"kind": "unobtainable"}},
            "pending_timeout": PATIENCE,
        },
        r"no node for the pod \(worth a retry\): no node for \d+ s: 0/\d+ nodes are available: .*check what runner.infer",
    ),
    "no-such-secret": (
        {"secret_env": {"KEY": {"secret": "nowhere", "key": "k"}}, "start_timeout": PATIENCE},
        r"pod can't be set up \(a retry can't help\): CreateContainerConfigError: secret \\?.nowhere\\?. not found; check the Secrets",
    ),
    "no-such-volume": (
        {"volumes": [{"mount": "BESIDE_MOODS", "secret": "nowhere"}], "start_timeout": PATIENCE},
        r"pod did not start \(worth a retry\): ContainerCreating; .*FailedMount: .*nowhere",
    ),
    "no-such-account": (
        {"service_account": "nobody"},
        r"pod refused by the cluster \(a retry can.{1,2}t help\): HTTP 403: .*nobody",
    ),
}


def test_pods_that_can_not_start_say_what_to_do(world: World) -> None:
    beside = f"{Path(world.cluster.mount).parent}/nowhere".replace("//", "/")
    for name, (runner, _) in UNSTARTABLE.items():
        world.add(name, retries=0, shape=ONE_BLOCK, **json.loads(json.dumps(runner).replace("BESIDE_MOODS", beside)))
    runs = {name: world.volumes.trigger(name) for name in UNSTARTABLE}
    for name, (_, said) in UNSTARTABLE.items():
        assert world.volumes.wait(name, runs[name], world.cluster.limit) == "failed"
        tasks = world.volumes.tasks(name, runs[name])
        assert (tasks["prepare"]["state"], tasks["prepare"]["try_number"]) == ("failed", 1)
        until(partial(says, world, name, runs[name], said), 60)
        world.check_no_pod_left(name)


def says(world: World, name: str, run: str, words: str) -> bool:
    """Whether the log of the preparation says something; a task's state can be known before the last lines of its log are."""
    return bool(re.search(words, world.volumes.log(name, run, "prepare", 1)))


def test_a_step_that_takes_long_leaves_its_worker(world: World) -> None:
    name = "thorough"
    world.add(name, {"prepare": ["count"]}, shape=ONE_BLOCK)
    run = world.volumes.trigger(name)

    def prepare() -> dict[str, Any]:
        return world.volumes.tasks(name, run)["prepare"]

    until(lambda: prepare()["state"] == "deferred" and counts(world, name), world.cluster.limit)
    world.let_go(name, "prepare")
    until(lambda: prepare()["state"] == "success", world.cluster.limit)

    assert prepare()["try_number"] == 1
    check_counting(world.volumes.log(name, run, "prepare", 1), more_than=3)
    world.volumes.client.patch(f"dags/{name}/dagRuns/{run}", {"state": "failed"})
    world.check_no_pod_left(name)


@pytest.mark.parametrize(
    "deferrable", [pytest.param(True, id="deferrable"), pytest.param(False, id="sync", marks=pytest.mark.long)]
)
def test_clearing_and_cancelling_delete_pods(world: World, deferrable: bool) -> None:
    name = f"cancelled-{'deferrable' if deferrable else 'sync'}"
    world.add(name, {"infer.0_0_0": ["hang", "hang"]}, shape=ONE_BLOCK, deferrable=deferrable)
    run = world.volumes.trigger(name)

    # While a task is just leaving its worker, nobody watches its pod: the next try goes on with it, or the maintenance finds it.
    def watched(attempt: int) -> list[str]:
        """Pods that hang and that this try of the task has seen at work."""
        if world.volumes.tasks(name, run)["infer.0_0_0"]["try_number"] != attempt:
            return []
        hanging = [pod for pod in running(world, name) if "mood: hang" in world.cluster.log(pod)]
        return [pod for pod in hanging if f"pod {pod}: running" in world.volumes.log(name, run, "infer.0_0_0", attempt)]

    first = until(partial(watched, 1), world.cluster.limit)
    world.volumes.clear(name, run, ["infer.0_0_0"])
    # Before the first pod is deleted, the next try may have begun to watch it; it then sees that it is gone, and launches another one.
    second = until(lambda: [pod for pod in watched(2) if pod not in first], world.cluster.limit)
    assert running(world, name) == second

    world.volumes.client.patch(f"dags/{name}/dagRuns/{run}", {"state": "failed"})
    world.check_no_pod_left(name)
    if world.cluster.double:
        assert len(world.pods_of(name, "infer.0_0_0")) == 2


def test_orphans_are_found(world: World) -> None:
    """A pod whose task is over is deleted by the maintenance, one whose task goes on is not; by hand all can be."""
    name = "with-orphans"
    world.add(name, {"infer.0_0_0": ["hang"]}, shape=ONE_BLOCK)
    run = world.volumes.trigger(name)
    at_work = until(lambda: [pod for pod in world.cluster.pods(name) if hangs(world, pod)], world.cluster.limit)[0]
    lost = orphan_of(at_work)
    world.cluster.api.create_namespaced_pod(world.cluster.namespace, lost)

    dag = "chunkflow_maintenance"
    world.volumes.known(dag)
    maintenance = world.volumes.trigger(dag, youngest=0)
    assert world.volumes.wait(dag, maintenance, world.cluster.limit) == "success"
    until(lambda: [pod["metadata"]["name"] for pod in world.cluster.pods(name)] == [at_work["metadata"]["name"]], 60)

    assert f"{at_work['metadata']['name']}  Running" in pods_command(world, name, "--delete", "ended")
    assert world.cluster.pods(name)
    world.volumes.client.patch(f"dags/{name}/dagRuns/{run}", {"state": "failed"})
    pods_command(world, name, "--delete", "all")
    world.check_no_pod_left(name)


def pods_command(world: World, volume: str, *options: str) -> str:
    """What ``chunkflow-core pods`` prints."""
    spec = str(world.volumes.folder / f"{volume}.yaml")
    command = [sys.executable, "-m", "chunkflow_core", "pods", spec, *options]
    if not world.cluster.double:
        command += ["--namespace", world.cluster.namespace]
    environment = os.environ | {"KUBECONFIG": str(world.cluster.kubeconfig)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def hangs(world: World, pod: dict[str, Any]) -> bool:
    return pod["status"].get("phase") == "Running" and "mood: hang" in world.cluster.log(pod["metadata"]["name"])


def orphan_of(pod: dict[str, Any]) -> dict[str, Any]:
    """A pod like another one, of a task of a run that is not there any more."""
    meta, spec = pod["metadata"], pod["spec"]
    container = {key: spec["containers"][0][key] for key in ("name", "image", "resources")}
    annotations = {
        "chunkflow/dag-id": "with-orphans",
        "chunkflow/run-id": "long-ago",
        "chunkflow/task-id": "infer.0_0_0",
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "orphan", "labels": meta["labels"], "annotations": annotations},
        "spec": {
            "restartPolicy": "Never",
            "terminationGracePeriodSeconds": 1,
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                container
                | {"securityContext": spec["containers"][0]["securityContext"]}
                | {"command": ["python", "-c", "import time; time.sleep(600)"]}
            ],
        },
    }


@pytest.mark.parametrize(
    "deferrable", [pytest.param(True, id="deferrable"), pytest.param(False, id="sync", marks=pytest.mark.long)]
)
def test_trouble_with_the_api(tmp_path: Path, world: World, deferrable: bool) -> None:
    """The API away for a while, answers lost, logs out of reach, too little quota: all is done once, and the logs are there."""
    cluster = world.cluster.double
    if cluster is None:
        pytest.skip("only the double's API can be made to fail")
    name = f"trouble-{'deferrable' if deferrable else 'sync'}"
    world.add(name, {"infer.0_0_0": ["count"]}, deferrable=deferrable, shape=(12, 24, 40))
    lost = cluster.add_fault("POST", r"/pods$", times=2, lost_response=True)
    expired = cluster.add_fault("*", r"/pods", times=2, status=401)
    logs = cluster.add_fault("GET", r"infer-0-0-1.*/log$", times=4, status=500)
    cut = cluster.add_fault("GET", r"/pods/[^/]*infer[^/]*$", times=2, cut=True)
    run = world.volumes.trigger(name, blend_memory="1536Mi")
    until(
        lambda: any("counting 3" in cluster.log(pod) for pod in world.pods_of(name, "infer.0_0_0")), world.cluster.limit
    )
    cluster.set_quota(0)
    cluster.pause()
    until(
        lambda: any("counting 12" in cluster.log(pod) for pod in world.pods_of(name, "infer.0_0_0")),
        world.cluster.limit,
    )
    cluster.resume()
    world.let_go(name, "infer.0_0_0")
    until(lambda: world.volumes.tasks(name, run)["infer.0_0_0"]["state"] == "success", world.cluster.limit)
    cluster.set_quota(None)

    assert world.volumes.wait(name, run, world.cluster.limit) == "success"

    assert (lost.left, expired.left, logs.left, cut.left) == (0, 0, 0, 0)
    done = world.volumes.tasks(name, run)
    assert {task["try_number"] for task in done.values()} == {1}
    memory = {task: done[task]["rendered_fields"]["memory"] for task in ("infer.0_0_0", "blend.0_0_1")}
    assert memory == {"infer.0_0_0": "1024Mi", "blend.0_0_1": "1536Mi"}, "what the form says goes before the spec"
    for task in ("infer.0_0_0", "infer.0_0_1", "blend.0_0_1"):
        assert len(world.pods_of(name, task)) == 1
    (arguments,) = [pod.box["args"] for pod in cluster.created if pod.name in world.pods_of(name, "blend.0_0_1")]
    assert {"roi=[[0, 0, 0], [12, 24, 40]]", f"input.bounds=[[0, 0, 0], {list(SHAPE)}]"} <= set(arguments)
    assert "patches inferred" in world.volumes.log(name, run, "infer.0_0_1", 1)
    check_counting(world.volumes.log(name, run, "infer.0_0_0", 1), more_than=12)
    world.check_no_pod_left(name)
