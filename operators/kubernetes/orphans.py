"""Pods that no task waits for any more.

A lost answer, a killed worker, or a cluster out of reach can leave them behind.

``chunkflow-core pods`` shows and deletes pods by hand; the DAG ``chunkflow_maintenance`` deletes
those whose task is not going on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Collection, Iterable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import Any

from chunkflow_core.commands.arguments import add_spec_arguments, spec_of
from chunkflow_core.errors import SpecError, StorageError, UsageError
from chunkflow_core.spec.runner import KubernetesRunner
from operators.kubernetes.ends import is_lost

MANAGED = "app.kubernetes.io/managed-by=chunkflow"
"""Label selector of all pods of ours."""
TASK_ANNOTATIONS = ("chunkflow/dag-id", "chunkflow/run-id", "chunkflow/task-id")
"""Whose pod it is, unabridged: labels can't hold every character of a run id."""
AIRFLOW_LABEL = "chunkflow/airflow"
"""Label that tells the pods of one Airflow from those of another."""
ENDED = ("Succeeded", "Failed")
GOING_ON = frozenset(("scheduled", "queued", "running", "restarting", "deferred", "up_for_retry", "up_for_reschedule"))
"""States of tasks that may still come back to a pod."""


@dataclass(frozen=True, slots=True)
class PodInfo:
    """One pod."""

    name: str
    namespace: str
    phase: str
    task: tuple[str, str, str]
    """DAG, run, task."""
    stage: str
    block: str
    seconds: float
    """Age."""
    lost: bool = False
    """Whether it waits for a node that is lost, and only goes if it gets no time to end."""


def airflow_label() -> str:
    """The value of ``AIRFLOW_LABEL`` for this Airflow.

    It is a hash of its secret key, in a rotation of the older one.
    """
    from airflow.sdk.configuration import conf

    key = str(conf.get("core", "fernet_key", fallback="")).split(",")[-1]
    return hashlib.sha256(key.encode()).hexdigest()[:10]


def pod_info(pod: dict[str, Any], now: datetime) -> PodInfo:
    """What of a pod's object is of interest here."""
    meta = pod["metadata"]
    labels, annotations = meta.get("labels") or {}, meta.get("annotations") or {}
    dag, run, task = (str(annotations.get(key, "")) for key in TASK_ANNOTATIONS)
    return PodInfo(
        name=meta["name"],
        namespace=meta["namespace"],
        phase="Terminating" if meta.get("deletionTimestamp") else str((pod.get("status") or {}).get("phase")),
        task=(dag, run, task),
        stage=labels.get("chunkflow/stage", ""),
        block=labels.get("chunkflow/block", "").replace("_", " "),
        seconds=(now - datetime.fromisoformat(meta["creationTimestamp"])).total_seconds(),
        lost=is_lost(pod, now),
    )


States = Callable[[str, str, Collection[str]], dict[str, str]]
"""Gives the states of some tasks of a DAG's run; a task that is unknown is left out."""


def orphans(pods: Iterable[PodInfo], states: States) -> list[PodInfo]:
    """The pods whose task is not going on.

    Args:
        pods: All that there are.
        states: Of tasks.
    """
    runs: dict[tuple[str, str], list[PodInfo]] = {}
    for pod in pods:
        if not all(pod.task):
            continue  # not launched by a task
        runs.setdefault(pod.task[:2], []).append(pod)
    found = []
    for (dag, run), group in runs.items():
        known = states(dag, run, {pod.task[2] for pod in group})
        found += [pod for pod in group if known.get(pod.task[2]) not in GOING_ON]
    return found


def add_command(add: Callable[[str, object, str], argparse.ArgumentParser]) -> None:
    """The subcommand ``pods`` of ``chunkflow-core``."""
    sub = add("pods", pods_command, "List the pods of a volume in the cluster, or delete them.")
    add_spec_arguments(sub)
    sub.add_argument(
        "--delete",
        choices=("ended", "all"),
        help="delete those that have ended, or all, also those that work: cancel the DAG's run first, or it starts "
        "others",
    )
    sub.add_argument("--run", metavar="RUN", help="only those of this run of the DAG")
    sub.add_argument("--namespace", help="default: the spec's, or that of the kubeconfig's context")
    sub.add_argument("--context", help="of the kubeconfig; default: the current one")
    sub.add_argument("--json", action="store_true", help="for programs")


def pods_command(options: argparse.Namespace) -> None:
    """List or delete the pods of a volume."""
    spec = spec_of(options)
    if not isinstance(spec.runner, KubernetesRunner):
        raise SpecError(f"{options.spec}: runner.kind: {spec.runner.kind}: only with kubernetes are there pods")
    from operators.kubernetes.manifest import own_labels

    api, namespace = _cluster(options.context)
    namespace = options.namespace or spec.runner.namespace or namespace
    volume = own_labels(spec.name, "", None)["chunkflow/volume"]
    found = _list(api, namespace, f"{MANAGED},chunkflow/volume={volume}")
    pods = [pod for pod in found if options.run in (None, pod.task[1])]
    if options.json:
        print(json.dumps([asdict(pod) for pod in pods]))
    else:
        _print_table(pods, namespace)
    chosen = [pod for pod in pods if options.delete == "all" or (options.delete == "ended" and pod.phase in ENDED)]
    for pod in chosen:
        _delete(api, pod)
    if options.delete and not options.json:
        print(f"deleted {len(chosen)} of {len(pods)} pods")


def _print_table(pods: list[PodInfo], namespace: str) -> None:
    if not pods:
        print(f"no pods of this volume in the namespace {namespace}")
        return
    rows = [("POD", "STATE", "MINUTES", "STAGE", "BLOCK", "RUN")]
    rows += [(p.name, p.phase, f"{p.seconds / 60:.0f}", p.stage, p.block, p.task[1]) for p in pods]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())


def _cluster(context: str | None) -> tuple[Any, str]:
    """The API of the kubeconfig's cluster, or of the one that this runs in; the namespace there."""
    from kubernetes import client, config

    try:
        config.load_kube_config(context=context)
        contexts, current = config.list_kube_config_contexts()
        chosen = next((c for c in contexts if c["name"] == context), current)
        return client.CoreV1Api(), chosen["context"].get("namespace", "default")
    except config.ConfigException as error:
        try:
            config.load_incluster_config()
        except config.ConfigException:
            raise UsageError(f"no cluster to ask: {error}; set KUBECONFIG, or run this in a pod") from None
        return client.CoreV1Api(), "default"


def _list(api: Any, namespace: str, selector: str) -> list[PodInfo]:
    now = datetime.now(UTC)
    found = _ask(lambda: api.list_namespaced_pod(namespace, label_selector=selector, _preload_content=False))
    return [pod_info(pod, now) for pod in json.loads(found.data)["items"]]


def _delete(api: Any, pod: PodInfo) -> None:
    from kubernetes.client import ApiException

    grace = {"grace_period_seconds": 0} if pod.lost else {}
    try:
        _ask(lambda: api.delete_namespaced_pod(pod.name, pod.namespace, _preload_content=False, **grace))
    except StorageError as error:
        if not isinstance(error.__cause__, ApiException) or error.__cause__.status != 404:
            raise


def _ask(call: Callable[[], Any]) -> Any:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return call()
    except (ApiException, HTTPError, OSError) as error:
        reason = f"HTTP {error.status} {error.reason}" if isinstance(error, ApiException) else str(error)
        raise StorageError(f"the cluster's API: {reason}") from error
