"""How tests ask the double of a cluster: pods to create, and what the API shows of them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
from kubernetes.client import ApiClient, CoreV1Api
from kubernetes.client.exceptions import ApiException
from kubernetes.config import new_client_from_config

from tests.support.cluster.double import Cluster
from tests.support.cluster.timing import Timing

IMAGE = "registry.example/chunkflow:1"
QUICK = Timing(
    schedule=0.01, create=0.01, back_off=0.05, log_lead=0.15, phase=0.05, linger=0.1, toleration=0.2, shutdown=0.3
)
FOREVER = ["sh", "-c", "echo up; while :; do sleep 0.1; done"]
POLITE = ["sh", "-c", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.05; done"]


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


def api_of(cluster: Cluster) -> CoreV1Api:
    """A client of the cluster's API that never tries again."""
    client = new_client_from_config(str(cluster.kubeconfig))
    client.configuration.retries = False
    return CoreV1Api(ApiClient(client.configuration))


def wait_for_log(cluster: Cluster, name: str, text: str) -> None:
    """Wait until a pod has written just this."""
    cluster.wait(name, lambda _: cluster.log(name) == text)


def create(api: CoreV1Api, *arguments: Any, **keywords: Any) -> Any:
    """Create a pod; arguments as for ``manifest``."""
    return api.create_namespaced_pod("default", manifest(*arguments, **keywords))


def log_of(api: CoreV1Api, name: str, **options: Any) -> str:
    """The log of a pod, by the API.

    The client's own decoding would give the representation of bytes.
    """
    return str(api.read_namespaced_pod_log(name, "default", _preload_content=False, **options).data.decode())


def state(pod: dict[str, Any]) -> dict[str, Any]:
    """The state of the pod's container."""
    found: dict[str, Any] = pod["status"]["containerStatuses"][0]["state"]
    return found


def waits_for(reason: str) -> Callable[[dict[str, Any]], bool]:
    """Whether a pod's container waits for that reason."""

    def check(pod: dict[str, Any]) -> bool:
        statuses = pod["status"].get("containerStatuses")
        return bool(statuses) and statuses[0]["state"].get("waiting", {}).get("reason") == reason

    return check


def reasons(cluster: Cluster, name: str) -> list[str]:
    """The reasons of all events about a pod."""
    return [event["reason"] for event in cluster.events(name)]


def condition(pod: dict[str, Any], kind: str) -> dict[str, Any]:
    """The pod's condition of that type; empty if it has none."""
    return next((c for c in pod["status"].get("conditions", []) if c["type"] == kind), {})


def refusal(call: Callable[[], Any]) -> tuple[int, str, str]:
    """Code, reason and message of what the API answers to a call that it must refuse."""
    with pytest.raises(ApiException) as caught:
        call()
    body = json.loads(caught.value.body)
    assert body["kind"] == "Status" and body["code"] == caught.value.status
    return caught.value.status, body["reason"], body["message"]
