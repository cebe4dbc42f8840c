"""A real Airflow, a cluster, and what goes wrong between them.

Watchers that die, pods that can't start, an API that fails.

On the double by default; with ``-m cluster`` on a real cluster (``tests/README.md``).
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest

from operators.service.processes import send, tree
from operators.service.settings import Home
from operators.service.state import State
from tests.support.airflow.service import asked
from tests.support.airflow.volumes import until
from tests.support.airflow.world import ONE_BLOCK, World
from tests.support.cluster.clusters import why_no_real_cluster
from tests.support.cluster.images import NO_GPU_DRIVER
from tests.support.volume import SHAPE

pytestmark = pytest.mark.airflow

BLOCK = "infer.0_0_0"
"""Task of the only block of a small volume."""
ORPHAN = "orphan"
"""A pod that no task has launched."""


@dataclass(frozen=True)
class Begun:
    """A run that has begun."""

    world: World
    name: str
    run: str
    deferrable: bool

    def task(self, task: str = BLOCK) -> dict[str, Any]:
        """A task instance as it is now."""
        return self.world.volumes.tasks(self.name, self.run)[task]

    def now(self, task: str = BLOCK) -> tuple[str | None, int]:
        """State and number of the try, where they are waited for."""
        return self.world.volumes.now(self.name, self.run, task)

    def log(self, attempt: int, task: str = BLOCK) -> str:
        return self.world.volumes.log(self.name, self.run, task, attempt)

    def watched(self, attempt: int, mood: str) -> list[str]:
        """Pods in a mood that this try of the block has seen at work.

        Only the log of a try that has begun can be read.
        """
        if self.now()[1] != attempt:
            return []
        pods = [pod for pod in running(self.world, self.name) if f"mood: {mood}" in self.world.cluster.log(pod)]
        return [pod for pod in pods if f"pod {pod}: running" in self.log(attempt)]

    def launched(self) -> list[str]:
        """All pods that the block has ever had; only the double knows."""
        return [pod for pod in self.world.pods_of(self.name, BLOCK) if pod != ORPHAN]

    def until(self, condition: Callable[[], Any]) -> Any:
        return until(condition, self.world.cluster.limit)

    def check_that_a_pod_outlives(self, component: str, attempt: int, *, same_try: bool) -> None:
        """Kill what watches the pod of this try of the block.

        The next process goes on with the same pod, and its log is complete.
        """
        (pod,) = self.until(lambda: counts(self.world, self.name) and self.watched(attempt, "count"))
        send(processes(self.world, component, self.task()["id"]), signal.SIGKILL)

        last = attempt if same_try else attempt + 1
        self.until(lambda: self.now()[1] == last)
        # The next process says so in the log of the same try, or of its own.
        self.until(lambda: self.log(last).count(f"pod {pod}: running") == (2 if same_try else 1))
        self.world.let_go(self.name, BLOCK)
        assert self.world.volumes.wait(self.name, self.run, self.world.cluster.limit) == "success"
        assert self.task()["try_number"] == last
        log = self.log(last)
        check_counting(log, more_than=3)
        assert log.count("patches inferred") == 1
        self.world.check_no_pod_left(self.name)


@pytest.fixture(
    scope="class",
    params=[pytest.param(True, id="deferrable"), pytest.param(False, id="sync", marks=pytest.mark.long)],
)
def begun(request: pytest.FixtureRequest, airflow_and_cluster: World) -> Iterator[Begun]:
    """A run of one block, whose pods do not do as they should."""
    world, name = airflow_and_cluster, f"troubled-{'deferrable' if request.param else 'sync'}"
    moods = {"prepare": ["count"], BLOCK: ["hang", "count", "hang"]}
    world.add(name, moods, shape=ONE_BLOCK, deferrable=request.param)
    yield Begun(world, name, world.volumes.trigger(name), request.param)
    world.remove_all()


class TestOneRun:
    """In this order; the block's first pod hangs, the second one counts, the third one hangs."""

    def test_a_step_that_takes_long_leaves_its_worker(self, begun: Begun) -> None:
        state = "deferred" if begun.deferrable else "running"
        begun.until(lambda: begun.now("prepare")[0] == state and counts(begun.world, begun.name))
        begun.world.let_go(begun.name, "prepare")
        begun.until(lambda: begun.now("prepare")[0] == "success")

        assert begun.task("prepare")["try_number"] == 1
        until(lambda: "[pod] counted" in begun.log(1, "prepare"), 60)
        check_counting(begun.log(1, "prepare"), more_than=3)

    def test_orphans_are_found(self, begun: Begun) -> None:
        """A pod whose task is over is deleted by the maintenance; one whose task goes on is not.

        Nor is it by hand, if that is not asked for.
        """
        world, name = begun.world, begun.name
        (at_work,) = begun.until(lambda: begun.watched(1, "hang"))
        (pod,) = [pod for pod in world.cluster.pods(name) if pod["metadata"]["name"] == at_work]
        world.cluster.api.create_namespaced_pod(world.cluster.namespace, orphan_of(pod, name))

        dag = "chunkflow_maintenance"
        world.volumes.known(dag)
        maintenance = world.volumes.trigger(dag, youngest=0)
        assert world.volumes.wait(dag, maintenance, world.cluster.limit) == "success"
        until(lambda: [pod["metadata"]["name"] for pod in world.cluster.pods(name)] == [at_work], 60)

        assert f"{at_work}  Running" in pods_command(world, name, "--delete", "ended")
        assert running(world, name) == [at_work]

    def test_clearing_deletes_the_pod(self, begun: Begun) -> None:
        """While a task is just leaving its worker, nobody watches its pod.

        The next try goes on with it, or the maintenance finds it.
        """
        (first,) = begun.watched(1, "hang")
        begun.world.volumes.clear(begun.name, begun.run, [BLOCK])
        # Before the first pod is deleted, the next try may have begun to watch it; it then sees
        # that it is gone, and launches another one.
        second = begun.until(lambda: begun.watched(2, "count"))
        assert first not in second
        assert running(begun.world, begun.name) == second

    def test_a_pod_outlives_what_watches_it(self, begun: Begun) -> None:
        if begun.deferrable:
            begun.check_that_a_pod_outlives("triggerer", 2, same_try=True)
        else:
            begun.check_that_a_pod_outlives("task", 2, same_try=False)
        if begun.world.cluster.double:
            assert len(begun.launched()) == 2

    def test_cancelling_deletes_the_pod_and_by_hand_all_can_be(self, begun: Begun) -> None:
        world, name = begun.world, begun.name
        world.volumes.clear(name, begun.run, [BLOCK])
        (last,) = begun.until(lambda: begun.watched(3 if begun.deferrable else 4, "hang"))
        (pod,) = [pod for pod in world.cluster.pods(name) if pod["metadata"]["name"] == last]
        world.volumes.client.patch(f"dags/{name}/dagRuns/{begun.run}", {"state": "failed"})
        world.check_no_pod_left(name)
        if world.cluster.double:
            assert len(begun.launched()) == 3

        world.cluster.api.create_namespaced_pod(world.cluster.namespace, orphan_of(pod, name))
        assert world.cluster.pods(name)
        pods_command(world, name, "--delete", "all")
        world.check_no_pod_left(name)


@pytest.mark.long
def test_a_pod_outlives_the_scheduler(world: World) -> None:
    name = "orphaned-by-scheduler"
    world.add(name, {BLOCK: ["count"]}, shape=ONE_BLOCK, deferrable=False)
    begun = Begun(world, name, world.volumes.trigger(name), deferrable=False)
    begun.check_that_a_pod_outlives("scheduler", 1, same_try=False)
    if world.cluster.double:
        assert len(begun.launched()) == 1


def counts(world: World, volume: str) -> bool:
    """Whether a pod of the volume has counted to three."""
    return any("counting 3" in world.cluster.log(pod) for pod in running(world, volume))


def check_counting(log: str, more_than: int) -> None:
    """A task's log has each line of a pod that counted, once."""
    (counted,) = re.findall(r"\[pod\] counted (\d+)", log)
    assert int(counted) > more_than
    assert re.findall(r"\[pod\] counting (\d+)", log) == [str(line) for line in range(int(counted))]


def check_told_once(log: str, trouble: str) -> None:
    """A task's log says when some trouble began and when it was over, nothing between."""
    over = [line.startswith("no longer, after ") for line in log.splitlines() if trouble in line]
    assert over == [False, True] * (len(over) // 2)
    assert over


def running(world: World, volume: str) -> list[str]:
    return [pod["metadata"]["name"] for pod in world.cluster.pods(volume) if pod["status"].get("phase") == "Running"]


def processes(world: World, component: str, task: str) -> list[psutil.Process]:
    """The processes of a component of Airflow; with ``task``, the one that runs this task."""
    state = State.read(Home(world.volumes.folder.parent / "home"))
    assert state is not None
    process = state.components["scheduler" if component == "task" else component].process()
    assert process is not None
    if component != "task":
        return [process]
    lines = asked(tree(process)[1:], psutil.Process.cmdline)
    ours = [process for process, line in lines if f"airflow worker -- {task}" in " ".join(line)]
    assert ours
    return ours


@pytest.mark.parametrize(
    "deferrable", [pytest.param(True, id="deferrable"), pytest.param(False, id="sync", marks=pytest.mark.long)]
)
def test_trouble_with_the_api(tmp_path: Path, world: World, deferrable: bool) -> None:
    """The API away for a while, answers lost, logs out of reach, too little quota.

    All is done once, and the logs are there.
    """
    cluster = world.cluster.double
    if cluster is None:
        pytest.skip("only the double's API can be made to fail")
    name = f"trouble-{'deferrable' if deferrable else 'sync'}"
    world.add(name, {"infer.0_0_0": ["count"]}, deferrable=deferrable, shape=(12, 24, 40))
    run = world.volumes.trigger(name, blend_memory="1536Mi")
    # From here on blocks go side by side, and so does what they wait for after each fault.
    until(lambda: world.volumes.now(name, run, "select_blocks")[0] == "success", world.cluster.limit)
    lost = cluster.add_fault("POST", r"/pods$", times=2, lost_response=True)
    expired = cluster.add_fault("*", r"/pods", times=2, status=401)
    logs = cluster.add_fault("GET", r"infer-0-0-1.*/log$", times=4, status=500)
    cut = cluster.add_fault("GET", r"/pods/[^/]*infer[^/]*$", times=2, cut=True)
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
    until(lambda: world.volumes.now(name, run, "infer.0_0_0")[0] == "success", world.cluster.limit)
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
    log = world.volumes.log(name, run, "infer.0_0_1", 1)
    assert "patches inferred" in log
    check_told_once(log, "is out of reach")
    if not deferrable:
        check_told_once(world.volumes.log(name, run, "infer.0_0_0", 1), "can't look at pod")
    check_counting(world.volumes.log(name, run, "infer.0_0_0", 1), more_than=12)
    world.check_no_pod_left(name)


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
        r"no node for the pod \(worth a retry\): no node for \d+ s: 0/\d+ nodes are available: .*"
        r"check what runner.infer",
    ),
    "no-such-secret": (
        {"secret_env": {"KEY": {"secret": "nowhere", "key": "k"}}, "start_timeout": PATIENCE},
        r"pod can't be set up \(a retry can't help\): CreateContainerConfigError: secret \\?.nowhere\\?. not found; "
        r"check the Secrets",
    ),
    "no-such-volume": (
        {"volumes": [{"mount": "BESIDE_MOODS", "secret": "nowhere"}], "start_timeout": PATIENCE},
        r"pod did not start \(worth a retry\): ContainerCreating; .*FailedMount: .*nowhere",
    ),
    "no-such-claim": (
        {"volumes": [{"mount": "BESIDE_MOODS", "claim": "nowhere"}], "start_timeout": PATIENCE},
        r"pod can't be set up \(a retry can't help\): there is no claim nowhere in the pod's namespace",
    ),
    "no-such-account": (
        {"service_account": "nobody"},
        r"pod refused by the cluster \(a retry can.{1,2}t help\): HTTP 403: .*nobody",
    ),
}


BROKEN = "broken-node"
"""A volume whose pods may go to two nodes, of which one can't start any."""


@pytest.fixture(scope="module")
def unstartable(airflow_and_cluster: World) -> Iterator[dict[str, str]]:
    """Runs of volumes whose pods can't start, all at once: the run's id by the volume's name.

    Tests of it come last: one of the runs goes on after them.
    """
    world = airflow_and_cluster
    beside = f"{Path(world.cluster.mount).parent}/nowhere".replace("//", "/")
    for name, (runner, _) in UNSTARTABLE.items():
        world.write(name, retries=0, shape=ONE_BLOCK, **json.loads(json.dumps(runner).replace("BESIDE_MOODS", beside)))
    names = list(UNSTARTABLE)
    if world.cluster.double:
        world.cluster.double.break_node("node-18", NO_GPU_DRIVER)
        near = {"key": "kubernetes.io/hostname", "operator": "In", "values": ["node-18", "node-19"]}
        required = {"nodeSelectorTerms": [{"matchExpressions": [near]}]}
        affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}
        infer = world.cluster.runner_section({}, "")["infer"] | {"affinity": affinity}
        world.write(BROKEN, shape=ONE_BLOCK, infer=infer)
        names.append(BROKEN)
    world.volumes.known(*names)
    yield {name: world.volumes.trigger(name) for name in names}
    if world.cluster.double:
        world.cluster.double.node_back("node-18")
    world.remove_all()


def test_pods_that_can_not_start_say_what_to_do(airflow_and_cluster: World, unstartable: dict[str, str]) -> None:
    world = airflow_and_cluster
    for name, (_, said) in UNSTARTABLE.items():
        run = unstartable[name]
        assert world.volumes.wait(name, run, world.cluster.limit) == "failed"
        tasks = world.volumes.tasks(name, run)
        assert (tasks["prepare"]["state"], tasks["prepare"]["try_number"]) == ("failed", 1)
        until(partial(says, world, name, run, said), 60)
        world.check_no_pod_left(name)


def test_a_node_that_can_not_start_pods_is_avoided(airflow_and_cluster: World, unstartable: dict[str, str]) -> None:
    """Not the image's fault: the try counts, and the next one goes elsewhere."""
    world = airflow_and_cluster
    if world.cluster.double is None:
        pytest.skip("only the double's nodes can be broken")
    run = unstartable[BROKEN]
    until(lambda: world.volumes.now(BROKEN, run, "prepare") == ("success", 2), world.cluster.limit)

    said = r"pod did not start \(exit code 128, worth a retry\): node node-18 could not start .*libnvidia-ml"
    assert re.search(said, world.volumes.log(BROKEN, run, "prepare", 1))
    wanted = {"chunkflow/volume": BROKEN, "chunkflow/stage": "prepare"}
    places = [pod.node for pod in world.cluster.double.created if wanted.items() <= pod.labels.items()]
    assert places == ["node-18", "node-19"]


def says(world: World, name: str, run: str, words: str) -> bool:
    """Whether the log of the preparation says something.

    A task's state can be known before the last lines of its log are.
    """
    return bool(re.search(words, world.volumes.log(name, run, "prepare", 1)))


def pods_command(world: World, volume: str, *options: str) -> str:
    """What ``chunkflow-core pods`` prints."""
    spec = str(world.volumes.folder / f"{volume}.yaml")
    command = [sys.executable, "-m", "chunkflow_core", "pods", spec, *options]
    if not world.cluster.double:
        command += ["--namespace", world.cluster.namespace]
    environment = os.environ | {"KUBECONFIG": str(world.cluster.kubeconfig)}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def orphan_of(pod: dict[str, Any], volume: str) -> dict[str, Any]:
    """A pod like another one, of a task of a run that is not there any more."""
    meta, spec = pod["metadata"], pod["spec"]
    container = {key: spec["containers"][0][key] for key in ("name", "image", "resources")}
    annotations = {
        "chunkflow/dag-id": volume,
        "chunkflow/run-id": "long-ago",
        "chunkflow/task-id": BLOCK,
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": ORPHAN, "labels": meta["labels"], "annotations": annotations},
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
