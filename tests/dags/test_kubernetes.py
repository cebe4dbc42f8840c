"""Volumes through a real Airflow and a cluster, pods ending in every way there is.

On the double by default; with ``-m cluster`` on a real cluster (``tests/README.md``).
"""

from __future__ import annotations

import json
from contextlib import closing
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from kubernetes import client
from numpy.typing import NDArray

from chunkflow_core.__main__ import main
from chunkflow_core.spec import load_spec
from chunkflow_core.storage.files import open_files
from tests.support.airflow.volumes import connect_to_database, write_own_dag
from tests.support.airflow.world import CANARY, ONE_BLOCK, World, write_spec
from tests.support.cluster import clusters
from tests.support.cluster.clusters import End, ends_from_outside
from tests.support.volume import output_of

pytestmark = pytest.mark.airflow

BLOCKS = [(z, y, x) for z in (0, 1) for y in (0, 1) for x in (0, 1)]
STEPS = {"prepare", "select_blocks", "verify", "publish", "cleanup", "summary"}
STAGES = {f"infer.{z}_{y}_{x}" for z, y, x in BLOCKS} | {f"blend.{z}_{y}_{x}" for z, y, x in BLOCKS[1:]}
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


@dataclass(frozen=True)
class OwnDag:
    """A run of the DAG of the docs, two blocks in pods."""

    spec: Path
    run: str
    right: NDArray[Any]
    """What one machine makes of the same volume: channel, z, y, x."""


@pytest.fixture(scope="module", autouse=True)
def own_dag(airflow_and_cluster: World, tmp_path_factory: pytest.TempPathFactory) -> OwnDag:
    """Goes beside the volumes of this file, as in a lab."""
    world, shape = airflow_and_cluster, (12, 24, 40)
    alone = write_spec(tmp_path_factory.mktemp("alone"), world.cluster.storage, "alone", {"kind": "local"}, shape)
    assert main(["run", str(alone)]) == 0
    section = world.cluster.runner_section({}, f"{world.cluster.storage}/membrane/moods")
    spec = write_spec(world.volumes.dags, world.cluster.storage, "membrane", section, shape)
    write_own_dag(world.volumes.dags)
    world.volumes.known("two_blocks")
    return OwnDag(spec, world.volumes.trigger("two_blocks"), output_of(alone))


@pytest.mark.parametrize(
    ("deferrable", "groups"),
    [
        pytest.param(True, ["infer blend"], id="in either stage"),
        pytest.param(True, ["infer", "blend"], id="in each stage", marks=pytest.mark.long),
        pytest.param(False, ["infer", "blend"], id="in each stage, sync", marks=pytest.mark.long),
    ],
)
def test_every_end_that_a_retry_cures(world: World, deferrable: bool, groups: list[str]) -> None:
    """Each end once in each group of stages.

    The volume comes out right all the same, and only what is the block's fault counts.
    """
    name = f"cured-{len(groups)}-{'deferrable' if deferrable else 'sync'}"
    by_itself = ["exit 75", "exit 1", "kill 9", "memory 1300"]
    if not world.cluster.double:
        by_itself.append("disk 3000")  # the kubelet evicts it for that
    moods: dict[str, list[str]] = {task: [] for task in STAGES}
    ends: dict[str, list[End]] = {task: [] for task in STAGES}
    for stages in groups:
        tasks = cycle(sorted(task for task in STAGES if task.partition(".")[0] in stages.split()))
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


@pytest.mark.parametrize(
    "deferrable", [pytest.param(True, id="deferrable", marks=pytest.mark.long), pytest.param(False, id="sync")]
)
def test_ends_that_no_retry_cures_wait_for_the_user(world: World, deferrable: bool) -> None:
    """Wrong data, a wrong spec, wrong usage, a missing layer.

    Failed at once, said why, everything else done; cleared, all is well.
    """
    name = f"final-{'deferrable' if deferrable else 'sync'}"
    failing = {"infer.0_0_0": 65, "infer.1_1_0": 78, "infer.1_1_1": 66, "blend.0_1_1": 64}
    late = {"infer.0_0_1": "hang"}
    moods = {task: [f"exit {code}"] for task, code in failing.items()} | {task: [mood] for task, mood in late.items()}
    moods |= {"blend.0_0_1": ["exit 65"], "blend.0_1_0": ["exit 66"]}
    section = world.cluster.runner_section({}, "")
    deadline = 20 if world.cluster.double else 300
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


def test_a_secret_in_a_spec_is_told_to_nobody(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pods have it from the cluster; it is in no manifest, log, database or file.

    An inference that fails once tells neither.
    """
    name, ((variable, value),) = "canary", CANARY.items()
    monkeypatch.setenv(variable, value)
    secret = client.V1Secret(metadata=client.V1ObjectMeta(name=name), string_data={variable: value})
    world.cluster.api.create_namespaced_secret(world.cluster.namespace, secret)
    secret_env = {variable: {"secret": name, "key": variable}}
    world.write(name, {"infer.0_0_0": ["exit 1"]}, ONE_BLOCK, secret_env=secret_env)
    file = world.volumes.folder / f"{name}.yaml"
    spec = yaml.safe_load(file.read_text())
    spec["model"]["options"] = {"key": f"${{{variable}}}"}
    spec["exchange"]["path"] += f"-${{{variable}}}"
    file.write_text(yaml.safe_dump(spec))
    world.volumes.known(name)
    run = world.volumes.trigger(name)
    assert world.volumes.wait(name, run, world.cluster.limit) == "success"

    done = world.volumes.tasks(name, run)
    tries = [(task, n + 1) for task, instance in done.items() for n in range(instance["try_number"])]
    assert ("infer.0_0_0", 2) in tries
    logs = {place: world.volumes.log(name, run, *place) for place in tries}
    assert "mood: exit 1" in logs["infer.0_0_0", 1]
    assert [place for place, log in logs.items() if value in log] == []
    assert [row for row in rows_with(world.volumes.home, name) if value in row] == []
    copies = open_files(load_spec(file).exchange.path)
    names = [copy for copy in copies.list() if "logs/" in copy]
    assert names
    assert [copy["path"] for copy in copies.get(names) if value.encode() in copy["content"]] == []
    if world.cluster.double:
        pods = [pod for pod in world.cluster.double.created if pod.labels.get("chunkflow/volume") == name]
        assert {pod.labels["chunkflow/stage"] for pod in pods} >= {"prepare", "plan", "infer", "verify", "report"}
        assert [pod.name for pod in pods if value in json.dumps(pod.object)] == []
        assert [pod.name for pod in pods if value in pod.text] == []


def rows_with(home: Path, word: str) -> list[str]:
    """All rows of Airflow's database in which a word stands."""
    with closing(connect_to_database(home)) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT table_name FROM information_schema.tables WHERE table_schema = 'public'")
        found: list[str] = []
        for (table,) in cursor.fetchall():
            cursor.execute(f'SELECT t::text FROM "{table}" t WHERE t::text LIKE %s', (f"%{word}%",))
            found += [row for (row,) in cursor.fetchall()]
    assert len(found) > 10
    return found


def test_a_dag_of_ones_own(world: World, own_dag: OwnDag) -> None:
    """The DAG of the docs does two blocks in pods, as one machine would do them."""
    assert world.volumes.wait("two_blocks", own_dag.run, world.cluster.limit) == "success"

    tasks = world.volumes.tasks("two_blocks", own_dag.run)
    assert {task["operator_name"] for task in tasks.values()} == {"prepare", "infer", "blend"}
    fields = tasks["blend_1"]["rendered_fields"]
    assert (fields["spec"], fields["block"]) == (str(own_dag.spec), [0, 0, 1])
    assert fields["memory"].endswith("Mi")
    np.testing.assert_array_equal(output_of(own_dag.spec), own_dag.right)
    world.check_no_pod_left("membrane")
