"""A task and its pods on a cluster that misbehaves, and what the maintenance does later."""

from __future__ import annotations

import logging
import re
import threading
from collections.abc import Collection, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from kubernetes.client import CoreV1Api
from kubernetes.config import new_client_from_config

from chunkflow_core.__main__ import main
from chunkflow_core.spec.runner import KubernetesRunner
from operators.commands import Infer
from operators.kubernetes import ends
from operators.kubernetes.api import PodApi
from operators.kubernetes.log import PodLog
from operators.kubernetes.maintenance import DeleteOrphansOperator
from operators.kubernetes.orphans import AIRFLOW_LABEL, MANAGED, TASK_ANNOTATIONS, airflow_label
from operators.kubernetes.pods import TaskPods
from operators.kubernetes.task_state import TaskState
from operators.outcomes import Kind, Outcome, Retry
from tests.support.airflow.volumes import until
from tests.support.cluster.client import FOREVER, IMAGE, QUICK, api_of, create
from tests.support.cluster.double import Cluster
from tests.support.volume import write_volume

COUNTING = ["sh", "-c", "for n in $(seq 1000); do echo line $n; sleep 0.05; done"]
PATIENCE = 30.0
"""Seconds."""


@pytest.fixture
def cluster(tmp_path: Path) -> Iterator[Cluster]:
    with Cluster(tmp_path / "kubeconfig", images=[IMAGE], timing=QUICK) as running:
        yield running


@pytest.fixture
def api(cluster: Cluster) -> PodApi:
    """The task's calls, with a client as the cluster's own configuration makes it."""
    client = CoreV1Api(new_client_from_config(str(cluster.kubeconfig)))
    return PodApi(lambda: client, lambda: None)


class Store(dict[str, Any]):
    """A task's state as Airflow gives it to a task: values by key."""

    def set(self, key: str, value: Any) -> None:
        self[key] = value


def state_of(store: Store, attempt: int = 1) -> TaskState:
    context: Any = {"task_state_store": store, "ti": SimpleNamespace(try_number=attempt)}
    return TaskState(context)


def pods_of(api: PodApi, store: Store) -> TaskPods:
    runner = KubernetesRunner.model_validate({"kind": "kubernetes", "image": IMAGE})
    log = logging.getLogger("a task")
    return TaskPods(api, state_of(store), runner, Infer((0, 0, 0)), volume="em", log=log)


def test_trouble_is_told_once_and_when_it_is_over(
    cluster: Cluster, api: PodApi, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    create(api_of(cluster), "pod", COUNTING)
    cluster.wait("pod", "Running")
    pods = pods_of(api, Store())
    log = PodLog("pod", "default")
    watch = threading.Thread(target=pods.follow, args=(log,), kwargs={"interval": 0.05}, daemon=True)
    watch.start()
    until(lambda: "[pod] line 3" in caplog.messages, PATIENCE)

    unreadable = cluster.add_fault("GET", r"/log$", times=10, status=500)
    until(lambda: unreadable.left == 0, PATIENCE)
    cluster.pause()
    until(lambda: any("can't look" in message for message in caplog.messages), PATIENCE)
    written = cluster.log("pod").count("\n")
    until(lambda: cluster.log("pod").count("\n") > written + 20, PATIENCE)
    cluster.resume()
    until(lambda: any("no longer" in message and "can't look" in message for message in caplog.messages), PATIENCE)
    cluster.delete_pod("pod", grace=0)
    watch.join(PATIENCE)

    assert not watch.is_alive()
    told = [message for message in caplog.messages if not message.startswith("[pod] ")]
    log_trouble = (
        r"the log of pod pod is out of reach: .*",
        r"no longer, after \d+ s: the log of pod pod is out of reach",
    )
    of_log = [message for message in told if "the log of pod pod" in message]
    # the API may go away after a look at the pod, and before one at its log: then both are told
    assert len(of_log) in (2, 4), told
    expected = (
        r"pod pod: running",
        r"can't look at pod pod: .*",
        r"no longer, after \d+ s: can't look at pod pod",
        r"pod pod: gone",
    )
    others = [message for message in told if message not in of_log]
    assert len(others) == len(expected), told
    for message, pattern in zip(of_log + others, [*log_trouble * (len(of_log) // 2), *expected], strict=True):
        assert re.fullmatch(pattern, message), told
    assert told[0] == others[0] and told[-1] == others[-1] and "HTTP 500" in of_log[0], told
    lines = [message for message in caplog.messages if message.startswith("[pod] ")]
    assert lines == [f"[pod] line {number}" for number in range(1, len(lines) + 1)]


def test_nodes_that_could_not_start_a_pod_are_remembered(api: PodApi) -> None:
    store = Store()
    pods = pods_of(api, store)
    for number, node in enumerate(["a", "b", "", "a"]):
        pods.note_end(f"pod-{number}", Outcome(Kind.NOT_STARTED, Retry.COUNTED, "no driver", 128, bad_node=node))
    assert state_of(store, attempt=2).bad_nodes == ["b", "a"]
    for number in range(30):
        pods.note_end(f"more-{number}", Outcome(Kind.NOT_STARTED, Retry.COUNTED, "no driver", bad_node=f"n{number}"))
    assert state_of(store).bad_nodes == [f"n{number}" for number in range(20, 30)]


@pytest.mark.parametrize(("priority", "told"), [(None, True), ("high", False)])
def test_a_pod_that_is_gone_may_have_been_preempted(api: PodApi, priority: str | None, told: bool) -> None:
    pods = pods_of(api, Store())
    pods.resources = pods.resources.model_copy(update={"priority_class": priority})
    gone = ends.vanished("pod").outcome
    assert gone
    assert ("no priority_class: pods of a higher priority" in pods.explained("pod", "default", gone).message) is told


@pytest.fixture
def stuck(cluster: Cluster) -> str:
    """A pod that was deleted after its node had lost its power: it stays until the node is back."""
    annotations = dict(zip(TASK_ANNOTATIONS, ("em", "yesterday", "infer.0_0_0"), strict=True))
    managed, _, by = MANAGED.partition("=")
    labels = {managed: by, AIRFLOW_LABEL: airflow_label(), "chunkflow/volume": "em"}
    create(api_of(cluster), "stuck", FOREVER, labels=labels, annotations=annotations)
    cluster.wait("stuck", "Running")
    node = cluster.node_of("stuck")
    assert node
    cluster.lose_node(node)
    cluster.delete_pod("stuck", grace=1)
    cluster.delete_pod("stuck")
    assert cluster.pod("stuck"), "as on a real cluster, asking again changes nothing"
    return "stuck"


def no_states(dag: str, run: str, tasks: Collection[str]) -> dict[str, str]:
    return {}


def test_maintenance_gives_no_time_to_a_pod_whose_node_is_lost(
    cluster: Cluster, api: PodApi, stuck: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operator = DeleteOrphansOperator(task_id="delete_orphans", places=[])
    operator._clean(api, "default", no_states, youngest=0)
    assert cluster.pod(stuck), "its node may yet answer"

    for patience in ("_LOST", "_LOST_WITH_TAINT"):
        monkeypatch.setattr(ends, patience, 0.0)
    until(lambda: ends.is_lost(cluster.pod(stuck) or {}, ends.server_time(None)), PATIENCE)
    operator._clean(api, "default", no_states, youngest=0)

    assert cluster.pod(stuck) is None


def test_so_does_the_command(
    cluster: Cluster,
    stuck: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for patience in ("_LOST", "_LOST_WITH_TAINT"):
        monkeypatch.setattr(ends, patience, 0.0)
    until(lambda: ends.is_lost(cluster.pod(stuck) or {}, ends.server_time(None)), PATIENCE)
    spec = write_volume(tmp_path, name="em", runner={"kind": "kubernetes", "image": IMAGE})
    # What KUBECONFIG says is read when the client is imported.
    monkeypatch.setattr("kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION", str(cluster.kubeconfig))

    assert main(["pods", str(spec), "--delete", "all"]) == 0

    assert "deleted 1 of 1 pods" in capsys.readouterr().out
    assert cluster.pod(stuck) is None
