"""Volumes through a real Airflow and a cluster, pods ending in every way there is.

On the double by default; with ``-m cluster`` on a real cluster (``tests/README.md``).
"""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import clusters
import numpy as np
import psutil
import pytest
import yaml
from airflow_volumes import Volumes, until
from clusters import End, TestCluster, ends_from_outside, the_double, the_real_one, why_no_real_cluster
from double import Node
from numpy.typing import NDArray
from volume import SHAPE

from chunkflow_core.__main__ import main
from chunkflow_core.geometry import Box, Vector
from chunkflow_core.spec import load_spec
from chunkflow_core.stages import Workspace
from chunkflow_core.volumes import NewLayer
from operators.processes import with_variable
from operators.service import Client, start

BLOCKS = [(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]
STEPS = {"prepare", "select_blocks", "verify", "publish", "cleanup", "summary"}
STAGES = {f"infer.{z}_{y}_{x}" for z, y, x in BLOCKS} | {f"blend.{z}_{y}_{x}" for z, y, x in BLOCKS[1:]}
_WHERE = [
    pytest.param("double", id="double"),
    pytest.param(
        "real",
        id="real",
        marks=[
            pytest.mark.cluster,
            pytest.mark.skipif(why_no_real_cluster() is not None, reason=str(why_no_real_cluster())),
        ],
    ),
]


class Metrics(threading.Thread):
    """A StatsD server: keeps what Airflow sends."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.bind(("127.0.0.1", 0))
        self.names: set[str] = set()

    def run(self) -> None:
        while packet := self.socket.recv(65536):
            self.names |= {line.partition(":")[0] for line in packet.decode().splitlines()}


@dataclass(frozen=True)
class World:
    """Airflow and a cluster."""

    volumes: Volumes
    cluster: TestCluster
    right: NDArray[Any]
    """What every volume's output has to be."""
    metrics: Metrics

    def add(
        self, name: str, moods: Mapping[str, list[str]] | None = None, shape: Vector = SHAPE, **runner: Any
    ) -> None:
        """Add a volume and wait until Airflow has it; ``shape`` takes only a part of the input."""
        section = self.cluster.runner_section(moods or {}, f"{self.cluster.storage}/{name}/moods", **runner)
        write_spec(self.volumes.folder, self.cluster.storage, name, section, shape)
        until(lambda: name in {dag["dag_id"] for dag in self.volumes.client.pages("dags", "dags")}, 90)

    def check_output(self, name: str) -> None:
        """The volume's output is bit for bit the right one, and no pod is left."""
        spec = load_spec(self.volumes.folder / f"{name}.yaml")
        np.testing.assert_array_equal(Workspace(spec).output.read(spec.grid.roi), self.right)
        self.check_no_pod_left(name)

    def pods_of(self, name: str, task: str) -> list[str]:
        """Names of all pods that a task ever had; only the double knows."""
        stage, _, block = task.partition(".")
        wanted = {"chunkflow/volume": name, "chunkflow/stage": stage, "chunkflow/block": block}
        assert self.cluster.double
        return [pod.name for pod in self.cluster.double.created if wanted.items() <= pod.labels.items()]

    def check_no_pod_left(self, name: str) -> None:
        """Pods are gone, or at least on their way."""
        until(lambda: not self.cluster.pods(name), 60)


def write_spec(folder: Path, storage: str, name: str, runner: dict[str, Any], shape: Vector = SHAPE) -> Path:
    spec = {
        "name": name,
        "input": {"path": f"{storage}/input"},
        "output": {"path": f"{storage}/{name}/output", "channels": 2, "dtype": "float32", "chunk_size": [4, 8, 8]},
        "exchange": {"path": f"{storage}/{name}/exchange"},
        "roi": [[0, 0, 0], list(shape)],
        "patch_size": [8, 16, 16],
        "patch_overlap": [2, 4, 4],
        "block_size": [12, 24, 24],
        "model": {"engine": "identity"},
        "runner": runner,
    }
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump(spec))
    return path


@pytest.fixture(scope="module", params=_WHERE)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    folder = tmp_path_factory.mktemp("kubernetes")
    specs = folder / "specs"
    specs.mkdir()
    with ExitStack() as stack:
        cluster = stack.enter_context(
            the_double(folder, nodes=[Node(f"node-{n}") for n in range(20)])
            if request.param == "double"
            else the_real_one()
        )
        data = np.random.default_rng(1).integers(0, 256, (1, *SHAPE), dtype=np.uint8)
        layer = NewLayer(f"{cluster.storage}/input", SHAPE, dtype="uint8", resolution=(40, 4, 4), chunk=(8, 16, 16))
        layer.write(Box((0, 0, 0), SHAPE), data)
        local = write_spec(folder, cluster.storage, "local", {"kind": "local"})
        assert main(["run", str(local)]) == 0
        right = Workspace(load_spec(local)).output.read(load_spec(local).grid.roi)
        metrics = Metrics()
        metrics.start()
        environment = cluster.environment | {
            "AIRFLOW__METRICS__STATSD_ON": "True",
            "AIRFLOW__METRICS__STATSD_HOST": "127.0.0.1",
            "AIRFLOW__METRICS__STATSD_PORT": str(metrics.socket.getsockname()[1]),
            "CHUNKFLOW_VOLUMES": str(specs),
            "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "2",
            "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "4",
            # A task whose process was killed is noticed in seconds, not in five minutes.
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT": "20",
            "AIRFLOW__SCHEDULER__TASK_INSTANCE_HEARTBEAT_TIMEOUT_DETECTION_INTERVAL": "3",
        }
        service = stack.enter_context(start(folder / "home", environment=environment, with_parent=True))
        client = stack.enter_context(Client(service))
        yield World(Volumes(client, specs), cluster, right, metrics)


# A pod that is deleted may be gone before anybody looks at why.
KINDS: dict[End, set[str]] = {
    clusters.delete: {"deleted"},
    clusters.drain: {"evicted", "deleted"},
    clusters.preempt: {"preempted", "deleted"},
    clusters.evict: {"evicted"},
    clusters.evict_for_disk: {"evicted"},
    clusters.shut_down: {"node_shutdown"},
    clusters.lose: {"node_lost"},
}


SOFT = {clusters.delete, clusters.drain, clusters.preempt, clusters.shut_down}
"""Ends that leave a pod time to say its last words."""


@pytest.mark.airflow
@pytest.mark.parametrize("deferrable", [True, False], ids=["deferrable", "sync"])
def test_every_end_that_a_retry_cures(world: World, deferrable: bool) -> None:
    """Each end once in each stage; the volume comes out right nevertheless, and nothing is counted that is not the block's fault."""
    name = f"cured-{'deferrable' if deferrable else 'sync'}"
    by_itself = ["exit 75", "exit 1", "kill 9", "memory 1300"]
    if not world.cluster.double:
        by_itself.append("disk 3000")  # the kubelet evicts it for that
    moods: dict[str, list[str]] = {task: [] for task in STAGES}
    ends: dict[str, list[End]] = {task: [] for task in STAGES}
    for stage in ("infer", "blend"):
        tasks = cycle(sorted(task for task in STAGES if task.startswith(stage)))
        for mood in by_itself:
            moods[next(tasks)].append(mood)
        for end in ends_from_outside(world.cluster):
            task = next(tasks)
            moods[task].insert(0, "hang")
            ends[task].append(end)
    world.add(name, moods, deferrable=deferrable)
    with world.cluster.ending(name, ends) as ended:
        run = world.volumes.trigger(name)
        assert world.volumes.wait(name, run, world.cluster.limit) == "success"
    assert sorted(ended) == sorted(task for task, some in ends.items() for _ in some)
    done = world.volumes.tasks(name, run)
    assert set(done) == STEPS | STAGES
    for task in STAGES:
        counted = [mood for mood in moods[task] if mood in by_itself]
        if (
            world.cluster.double or not counted
        ):  # on a real cluster, a lost node takes other pods along, and their moods
            assert done[task]["try_number"] == 1 + len(counted), task
        kinds = [end["kind"] for end in world.volumes.state(name, run, task)["pod_ends"]]
        assert kinds[-1] == "done"
        for end in ends[task]:
            assert KINDS[end] & set(kinds), (task, kinds)
        if SOFT & set(ends[task]):  # though the pod is gone: from the copy of its log
            assert "[pod] mood: hang" in world.volumes.log(name, run, task, 1)
        if "memory 1300" in counted and "out_of_memory" in kinds + ["out_of_memory"] * bool(world.cluster.double):
            assert "out_of_memory" in kinds
            assert done[task]["rendered_fields"]["memory"] == "2048Mi (grown after a pod was killed for memory)"
    ends_seen = {
        f"airflow.chunkflow.pod_ends.{kind}" for kind in ("done", "out_of_memory", "storage", "error", "killed")
    }
    assert ends_seen <= world.metrics.names
    world.check_output(name)


@pytest.mark.airflow
@pytest.mark.parametrize("deferrable", [True, False], ids=["deferrable", "sync"])
def test_ends_that_no_retry_cures_wait_for_the_user(world: World, deferrable: bool) -> None:
    """Wrong data, a wrong spec, wrong usage, a missing layer: failed at once, said why, everything else done; cleared, all is well."""
    name = f"final-{'deferrable' if deferrable else 'sync'}"
    failing = {"infer.0_0_0": 65, "infer.1_1_0": 78, "infer.1_1_1": 66, "blend.0_1_1": 64}
    late = {"infer.0_0_1": "hang"}
    moods = {task: [f"exit {code}"] for task, code in failing.items()} | {task: [mood] for task, mood in late.items()}
    moods |= {"blend.0_0_1": ["exit 65"], "blend.0_1_0": ["exit 66"]}
    section = world.cluster.runner_section({}, "")
    deadline = 30 if world.cluster.double else 300
    world.add(name, moods, deferrable=deferrable, infer=section["infer"] | {"deadline": deadline})
    run = world.volumes.trigger(name)

    assert world.volumes.wait(name, run, world.cluster.limit) == "failed"

    tasks = world.volumes.tasks(name, run)
    first = {"infer.0_0_0": 65, "infer.1_1_0": 78, "infer.1_1_1": 66}
    for task, code in first.items():
        assert (tasks[task]["state"], tasks[task]["try_number"]) == ("failed", 1)
        log = world.volumes.log(name, run, task, 1)
        assert f"(exit code {code}, a retry can't help): injected {code}" in log
        assert f"(exit code {code}, a retry can't help): injected {code}" in world.volumes.log(name, run, "summary", 1)
    assert (tasks["infer.0_0_1"]["state"], tasks["infer.0_0_1"]["try_number"]) == ("success", 2)
    assert "deadline exceeded (worth a retry)" in world.volumes.log(name, run, "infer.0_0_1", 1)
    untouched = {"infer.0_1_0", "infer.0_1_1", "infer.1_0_0", "infer.1_0_1"}
    assert {tasks[task]["state"] for task in untouched} == {"success"}
    world.check_no_pod_left(name)

    world.volumes.clear(name, run, sorted(first))
    assert world.volumes.wait(name, run, world.cluster.limit) == "failed"
    tasks = world.volumes.tasks(name, run)
    states = {task: tasks[task]["state"] for task in ("blend.0_0_1", "blend.0_1_1", "blend.0_1_0")}
    assert states == {"blend.0_0_1": "failed", "blend.0_1_1": "failed", "blend.0_1_0": "success"}
    assert tasks["blend.0_1_0"]["try_number"] == 2, "a donation may still come"

    world.volumes.clear(name, run, ["blend.0_0_1", "blend.0_1_1"])
    assert world.volumes.wait(name, run, world.cluster.limit) == "success"
    assert "8 of 8 blocks inferred, 7 blended" in world.volumes.log(name, run, "summary", 3)
    world.check_output(name)


ONE_BLOCK: Vector = (12, 24, 24)


@pytest.mark.airflow
@pytest.mark.parametrize("component", ["triggerer", "scheduler", "task"])
def test_a_pod_outlives_what_watches_it(world: World, component: str) -> None:
    """Whatever is killed while a pod runs, the next process goes on with the same pod, and its log is complete."""
    name, deferrable = f"orphaned-by-{component}", component == "triggerer"
    world.add(name, {"infer.0_0_0": ["count 60"]}, shape=ONE_BLOCK, deferrable=deferrable)
    run = world.volumes.trigger(name)
    until(lambda: any("counting 3" in world.cluster.log(pod) for pod in running(world, name)), world.cluster.limit)

    for process in processes(world, component):
        process.kill()

    assert world.volumes.wait(name, run, world.cluster.limit) == "success"
    if world.cluster.double:
        assert len(world.pods_of(name, "infer.0_0_0")) == 1
    tries = world.volumes.tasks(name, run)["infer.0_0_0"]["try_number"]
    assert tries == (1 if deferrable else 2)
    log = world.volumes.log(name, run, "infer.0_0_0", tries)
    assert re.findall(r"\[pod\] counting (\d+)", log) == [str(line) for line in range(60)]
    assert log.count("patches inferred") == 1
    world.check_no_pod_left(name)


def running(world: World, volume: str) -> list[str]:
    return [pod["metadata"]["name"] for pod in world.cluster.pods(volume) if pod["status"].get("phase") == "Running"]


def processes(world: World, component: str) -> list[psutil.Process]:
    """The processes of a component of Airflow; of ``task``, those that run tasks."""
    home = str(world.volumes.folder.parent / "home")
    name = "scheduler" if component == "task" else component
    ours = [
        p for p in with_variable("CHUNKFLOW_AIRFLOW_SUPERVISED", home) if f"airflow {name}" in " ".join(p.cmdline())
    ]
    if component != "task":
        return ours
    # A task's process writes its title over its environment.
    below = [child for process in ours for child in process.children(recursive=True)]
    return [p for p in below if re.match(r"airflow worker -- [0-9a-f-]{36}", " ".join(p.cmdline()))]


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


@pytest.mark.airflow
def test_pods_that_can_not_start_say_what_to_do(world: World) -> None:
    beside = f"{Path(world.cluster.mount).parent}/nowhere".replace("//", "/")
    for name, (runner, _) in UNSTARTABLE.items():
        world.add(name, retries=0, shape=ONE_BLOCK, **json.loads(json.dumps(runner).replace("BESIDE_MOODS", beside)))
    runs = {name: world.volumes.trigger(name) for name in UNSTARTABLE}
    for name, (_, said) in UNSTARTABLE.items():
        assert world.volumes.wait(name, runs[name], world.cluster.limit) == "failed"
        tasks = world.volumes.tasks(name, runs[name])
        assert (tasks["prepare"]["state"], tasks["prepare"]["try_number"]) == ("failed", 1)
        assert re.search(said, world.volumes.log(name, runs[name], "prepare", 1)), name
        world.check_no_pod_left(name)


@pytest.mark.airflow
@pytest.mark.parametrize("deferrable", [True, False], ids=["deferrable", "sync"])
def test_clearing_and_cancelling_delete_pods(world: World, deferrable: bool) -> None:
    name = f"cancelled-{'deferrable' if deferrable else 'sync'}"
    world.add(name, {"infer.0_0_0": ["hang", "hang"]}, shape=ONE_BLOCK, deferrable=deferrable)
    run = world.volumes.trigger(name)
    first = until(
        lambda: [pod for pod in running(world, name) if "mood: hang" in world.cluster.log(pod)], world.cluster.limit
    )

    world.volumes.clear(name, run, ["infer.0_0_0"])
    second = until(
        lambda: [pod for pod in running(world, name) if pod not in first and "mood: hang" in world.cluster.log(pod)],
        world.cluster.limit,
    )
    assert running(world, name) == second

    world.volumes.client.patch(f"dags/{name}/dagRuns/{run}", {"state": "failed"})
    world.check_no_pod_left(name)
    if world.cluster.double:
        assert len(world.pods_of(name, "infer.0_0_0")) == 2


@pytest.mark.airflow
def test_orphans_are_found(world: World) -> None:
    """A pod whose task is over is deleted by the maintenance, one whose task goes on is not; by hand all can be."""
    name = "with-orphans"
    world.add(name, {"infer.0_0_0": ["hang"]}, shape=ONE_BLOCK)
    run = world.volumes.trigger(name)
    at_work = until(lambda: [pod for pod in world.cluster.pods(name) if hangs(world, pod)], world.cluster.limit)[0]
    lost = orphan_of(at_work)
    world.cluster.api.create_namespaced_pod(world.cluster.namespace, lost)

    dag = "chunkflow_maintenance"
    until(lambda: dag in {found["dag_id"] for found in world.volumes.client.pages("dags", "dags")}, 60)
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
            "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
            "containers": [
                container
                | {"securityContext": spec["containers"][0]["securityContext"]}
                | {"command": ["python", "-c", "import time; time.sleep(600)"]}
            ],
        },
    }


@pytest.mark.airflow
@pytest.mark.parametrize("deferrable", [True, False], ids=["deferrable", "sync"])
def test_trouble_with_the_api(tmp_path: Path, world: World, deferrable: bool) -> None:
    """The API away for a while, answers lost, logs out of reach, too little quota: all is done once, and the logs are there."""
    cluster = world.cluster.double
    if cluster is None:
        pytest.skip("only the double's API can be made to fail")
    name = f"trouble-{'deferrable' if deferrable else 'sync'}"
    world.add(name, {"infer.0_0_0": ["count 20"]}, deferrable=deferrable, shape=(12, 24, 40))
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
    assert "patches inferred" in world.volumes.log(name, run, "infer.0_0_1", 1)
    counted = re.findall(r"\[pod\] counting (\d+)", world.volumes.log(name, run, "infer.0_0_0", 1))
    assert counted == [str(line) for line in range(20)]
    world.check_no_pod_left(name)
