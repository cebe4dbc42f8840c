"""The cluster that tests run pods on: the double, or with KUBECONFIG and ``-m cluster`` a real one.

Nothing that uses this may know which it is, but for what only the double can do
(``cluster.double``). The environment variables that describe a real cluster are in
``tests/README.md``.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any

from kubernetes import client, config, utils

from chunkflow_core.storage.clients import open_files
from tests.support.cluster.double import Cluster
from tests.support.nursery import shared

MOODS = Path(__file__).with_name("moods") / "sitecustomize.py"
_IMAGE = "chunkflow:test"
_HANGING = "mood: hang"
_CONFIG_MAP = "chunkflow-test-moods"
_DRAIN_SECONDS = 1.0

REAL_MOUNTS = "/var/tmp"
"""Folder below which pods of a real cluster find what is mounted for tests."""
RESOURCES = {"cpu": 0.5, "memory": "1Gi", "memory_max": "2Gi", "ephemeral_storage": "2Gi"}


@dataclass
class TestCluster:
    """A cluster to run volumes on, whether the double or a real one."""

    __test__ = False

    kubeconfig: Path
    namespace: str
    image: str
    storage: str
    """Address below which pods and tests can keep layers."""
    mount: str
    """Folder in which pods find the module that makes them misbehave."""
    runner: dict[str, Any]
    """What the runner section needs for this cluster, beside kind and image."""
    double: Cluster | None = None
    """The double; None on a real cluster."""

    @property
    def api(self) -> client.CoreV1Api:
        """A new client of the API."""
        return client.CoreV1Api(config.new_client_from_config(str(self.kubeconfig)))

    @property
    def environment(self) -> dict[str, str]:
        """Environment variables that tell Airflow of the cluster."""
        extra = {"kube_config_path": str(self.kubeconfig), "namespace": self.namespace}
        connection = {"conn_type": "kubernetes", "extra": extra}
        return {"AIRFLOW_CONN_KUBERNETES_DEFAULT": json.dumps(connection)}

    def runner_section(self, moods: Mapping[str, list[str]], place: str, **changes: Any) -> dict[str, Any]:
        """The runner section of a spec for this cluster.

        Args:
            moods: What the first, second, … process of a task does instead of its work, by task;
                see ``moods/sitecustomize.py``.
            place: Storage address below which it is remembered which moods have passed.
            **changes: Keys to add or replace.
        """
        section: dict[str, Any] = {
            "kind": "kubernetes",
            "image": self.image,
            "namespace": self.namespace,
            "retry_delay": 1,
            "poll_interval": 1,
            "termination_grace": 5,
            "infer": RESOURCES | {"gpu": 0},
            "blend": RESOURCES,
        } | self.runner
        section["volumes"] = [*section.get("volumes", []), {"mount": self.mount, "config_map": _CONFIG_MAP}]
        section["env"] = section.get("env", {}) | {
            "PYTHONPATH": self.mount,
            "CHUNKFLOW_MOODS": json.dumps(moods),
            "CHUNKFLOW_MOODS_URL": place,
        }
        return section | changes

    def pods(self, volume: str) -> list[dict[str, Any]]:
        """The objects of a volume's pods, as the API gives them."""
        found = self.api.list_namespaced_pod(
            self.namespace, label_selector=f"chunkflow/volume={volume}", _preload_content=False
        )
        items: list[dict[str, Any]] = json.loads(found.data)["items"]
        return items

    @contextmanager
    def ending(self, volume: str, ends: Mapping[str, Sequence[End]]) -> Iterator[list[str]]:
        """Meanwhile, end the pods of some tasks once they hang, one after the other.

        ``ends`` has the ends of each task's pods, in order. Gives a list that grows by the name of
        a task whenever one of its pods is ended.
        """
        ended: list[str] = []
        errors: list[Exception] = []
        stop = threading.Event()

        def watch() -> None:
            try:
                follow()
            except Exception as error:
                errors.append(error)

        def follow() -> None:
            left, seen = {task: list(todo) for task, todo in ends.items()}, set()
            while any(left.values()) and not stop.wait(0.2):
                for pod in self.pods(volume):
                    labels, name = pod["metadata"]["labels"], pod["metadata"]["name"]
                    task = f"{labels['chunkflow/stage']}.{labels.get('chunkflow/block', '')}"
                    if left.get(task) and name not in seen and self._hangs(pod):
                        seen.add(name)
                        left[task].pop(0)(self, name)
                        ended.append(task)

        thread = threading.Thread(target=watch, daemon=True)
        thread.start()
        try:
            yield ended
        finally:
            stop.set()
            thread.join()
        assert not errors, errors

    def _hangs(self, pod: Mapping[str, Any]) -> bool:
        if pod["status"].get("phase") != "Running":
            return False
        return _HANGING in self.log(pod["metadata"]["name"])

    def log(self, name: str) -> str:
        """The log of a pod; empty if there is none."""
        with suppress(client.ApiException):
            found = self.api.read_namespaced_pod_log(name, self.namespace, container="base", _preload_content=False)
            return str(found.data.decode(errors="replace"))
        return ""

    @property
    def limit(self) -> float:
        """Seconds after which a run counts as stuck.

        A real cluster takes minutes to see that a node is lost.
        """
        return 480.0 if self.double else 2400.0


End = Callable[[TestCluster, str], None]
"""A function that ends the pod of a name."""


def delete(cluster: TestCluster, name: str) -> None:
    """End a pod as ``kubectl delete pod`` does."""
    cluster.api.delete_namespaced_pod(name, cluster.namespace)


def drain(cluster: TestCluster, name: str) -> None:
    """End a pod as ``kubectl drain`` does, which a disruption budget does not allow at first."""
    core = cluster.api
    policy = client.PolicyV1Api(core.api_client)
    labels = core.read_namespaced_pod(name, cluster.namespace).metadata.labels
    budget = client.V1PodDisruptionBudget(
        metadata=client.V1ObjectMeta(name=name),
        spec=client.V1PodDisruptionBudgetSpec(min_available=1, selector=client.V1LabelSelector(match_labels=labels)),
    )
    policy.create_namespaced_pod_disruption_budget(cluster.namespace, budget)
    try:
        assert not _evicted(cluster, name), f"the disruption budget did not keep pod {name}"
    finally:
        policy.delete_namespaced_pod_disruption_budget(name, cluster.namespace)
    evict_when_allowed(cluster, name)


def evict_when_allowed(cluster: TestCluster, name: str) -> None:
    """End a pod by the API as soon as no disruption budget forbids it, asking again and again."""
    end = time.monotonic() + cluster.limit
    while not _evicted(cluster, name):
        if time.monotonic() > end:
            raise TimeoutError(f"for {cluster.limit:g} s a disruption budget kept pod {name}")
        time.sleep(_DRAIN_SECONDS)


def _evicted(cluster: TestCluster, name: str) -> bool:
    """Ask the API to evict a pod: whether no disruption budget forbids it; one that is gone is."""
    body = client.V1Eviction(metadata=client.V1ObjectMeta(name=name, namespace=cluster.namespace))
    try:
        cluster.api.create_namespaced_pod_eviction(name, cluster.namespace, body)
    except client.ApiException as error:
        if error.status not in (HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.NOT_FOUND):
            raise
        gone: bool = error.status == HTTPStatus.NOT_FOUND
        return gone
    return True


def preempt(cluster: TestCluster, name: str) -> None:
    """End a pod as the scheduler does for one of higher priority."""
    assert cluster.double
    cluster.double.preempt(name)


def evict(cluster: TestCluster, name: str) -> None:
    """End a pod as the kubelet does when memory gets short."""
    assert cluster.double
    cluster.double.evict(name)


def evict_for_disk(cluster: TestCluster, name: str) -> None:
    """End a pod as the kubelet does when the disk gets full: with less of a trace."""
    assert cluster.double
    cluster.double.evict(name, disruption_target=False, container_statuses=False)


def shut_down(cluster: TestCluster, name: str) -> None:
    """End a pod by a shutdown of its node."""
    _to_node(cluster, name, "CHUNKFLOW_TEST_SHUT_DOWN", "shutdown_node")


def lose(cluster: TestCluster, name: str) -> None:
    """End a pod by cutting its node's power."""
    _to_node(cluster, name, "CHUNKFLOW_TEST_LOSE", "lose_node")


def _to_node(cluster: TestCluster, name: str, variable: str, method: str) -> None:
    node = cluster.api.read_namespaced_pod(name, cluster.namespace).spec.node_name
    if cluster.double:
        getattr(cluster.double, method)(node)
    else:
        _run_for_node(variable, node)


def _run_for_node(variable: str, node: str) -> None:
    subprocess.run([*shlex.split(os.environ[variable]), node], check=True)


CUT_OFF, REJOIN = "CHUNKFLOW_TEST_CUT_OFF", "CHUNKFLOW_TEST_REJOIN"
"""Environment variables: how to cut a node of a real cluster off from the API, and have it back."""


def cut_off(cluster: TestCluster, nodes: Iterable[str]) -> None:
    """Cut nodes off from the API; their pods work on, and reach storage."""
    for node in nodes:
        if cluster.double:
            cluster.double.lose_node(node, alive=True)
        else:
            _run_for_node(CUT_OFF, node)


def rejoin(cluster: TestCluster, nodes: Iterable[str]) -> None:
    """Have nodes back that were cut off."""
    for node in nodes:
        if cluster.double:
            cluster.double.node_back(node)
        else:
            _run_for_node(REJOIN, node)


def why_no_node_can_be_cut_off(cluster: TestCluster) -> str | None:
    """What is missing for it; None: nothing is."""
    missing = [name for name in (CUT_OFF, REJOIN) if not os.environ.get(name)]
    return None if cluster.double or not missing else f"set {', '.join(missing)} (tests/README.md)"


def ends_from_outside(cluster: TestCluster) -> list[End]:
    """All ends that pods of this cluster can be given."""
    if cluster.double:
        return [delete, drain, preempt, evict, evict_for_disk, shut_down, lose]
    of_nodes = {"CHUNKFLOW_TEST_SHUT_DOWN": shut_down, "CHUNKFLOW_TEST_LOSE": lose}
    return [delete, drain, *(end for variable, end in of_nodes.items() if os.environ.get(variable))]


@contextmanager
def the_double(folder: Path, **options: Any) -> Iterator[TestCluster]:
    """The double, in a folder.

    Its pods' commands are forked from a process that has imported what they import. ``options`` are
    those of ``Cluster``.
    """
    mounts = folder / "mounts"
    cluster = Cluster(
        folder / "kubeconfig", images={_IMAGE}, folder=folder / "pods", mount_root=mounts, nursery=shared(), **options
    )
    with cluster:
        cluster.add_config_map(_CONFIG_MAP, {"sitecustomize.py": MOODS.read_text()})
        data = folder / "data"
        data.mkdir()
        yield TestCluster(
            kubeconfig=folder / "kubeconfig",
            namespace="default",
            image=_IMAGE,
            storage=f"file://{data}",
            mount=str(mounts / "moods"),
            runner={"volumes": [{"mount": str(data), "host_path": str(data)}]},
            double=cluster,
        )


def why_no_real_cluster() -> str | None:
    """What is missing for tests on a real cluster; None: nothing is."""
    needed = ("KUBECONFIG", "CHUNKFLOW_TEST_IMAGE", "CHUNKFLOW_TEST_STORAGE")
    missing = [name for name in needed if not os.environ.get(name)]
    return f"no real cluster: set {', '.join(missing)} (tests/README.md)" if missing else None


@contextmanager
def the_real_one() -> Iterator[TestCluster]:
    """The cluster of KUBECONFIG, in a namespace of its own that is deleted in the end."""
    kubeconfig = Path(os.environ["KUBECONFIG"])
    namespace = os.environ.get("CHUNKFLOW_TEST_NAMESPACE") or f"chunkflow-test-{uuid.uuid4().hex[:8]}"
    own = "CHUNKFLOW_TEST_NAMESPACE" not in os.environ
    place = f"{os.environ['CHUNKFLOW_TEST_STORAGE'].rstrip('/')}/{uuid.uuid4().hex[:8]}"
    cluster = TestCluster(
        kubeconfig=kubeconfig,
        namespace=namespace,
        image=os.environ["CHUNKFLOW_TEST_IMAGE"],
        storage=place,
        # Not at the root: the double as a real cluster has no file system of its own for each pod.
        mount=f"{REAL_MOUNTS}/chunkflow-moods-{uuid.uuid4().hex[:8]}",
        runner=json.loads(os.environ.get("CHUNKFLOW_TEST_RUNNER", "{}")),
    )
    api = cluster.api
    made = False
    if own:
        api.create_namespace(client.V1Namespace(metadata=client.V1ObjectMeta(name=namespace)))
    try:
        if own and (manifests := os.environ.get("CHUNKFLOW_TEST_MANIFESTS")):
            utils.create_from_yaml(api.api_client, manifests, namespace=namespace)
        body = client.V1ConfigMap(
            metadata=client.V1ObjectMeta(name=_CONFIG_MAP), data={"sitecustomize.py": MOODS.read_text()}
        )
        api.create_namespaced_config_map(namespace, body)
        made = True
        _wait_for_service_account(api, namespace)
        yield cluster
    finally:
        if own:
            api.delete_namespace(namespace)
        elif made:
            api.delete_namespaced_config_map(_CONFIG_MAP, namespace)
            api.delete_collection_namespaced_pod(namespace, label_selector="app.kubernetes.io/managed-by=chunkflow")
        files = open_files(place)
        files.delete(files.list())


def _wait_for_service_account(api: client.CoreV1Api, namespace: str) -> None:
    """Wait for the namespace's account: until it is there, pods are refused."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with suppress(client.ApiException):
            api.read_namespaced_service_account("default", namespace)
            return
        time.sleep(0.2)
    raise TimeoutError(f"the namespace {namespace} got no service account")
