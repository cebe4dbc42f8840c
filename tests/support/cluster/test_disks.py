"""Pods of the double that fill their node's disk."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from kubernetes.client import CoreV1Api

from tests.support.cluster.client import condition, create, state
from tests.support.cluster.double import Cluster

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="sessions and process file descriptors are Linux's")


def test_a_pod_beyond_its_limit_is_evicted_and_its_files_go(cluster: Cluster, api: CoreV1Api) -> None:
    limits = {"resources": {"limits": {"ephemeral-storage": "2Mi"}}}
    fill = "trap 'exit 7' TERM; F=$TMPDIR/filled; head -c {} /dev/zero > $F; echo $F; while :; do sleep 0.05; done"
    create(api, "little", ["sh", "-c", fill.format(2**20)], container=limits)
    create(api, "much", ["sh", "-c", fill.format(2**22)], container=limits)

    pod = cluster.wait("much", "Failed")

    assert pod["status"]["reason"] == "Evicted" and state(pod)["terminated"]["exitCode"] == 7
    assert not condition(pod, "DisruptionTarget")
    filled = Path(cluster.log("much").strip())
    cluster.wait("much", lambda _: not filled.exists())
    cluster.wait("little", "Running")
    assert Path(cluster.log("little").strip()).stat().st_size == 2**20
