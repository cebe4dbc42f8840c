"""Clusters for the double's own tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from kubernetes.client import CoreV1Api

from tests.support.cluster.client import IMAGE, QUICK, api_of
from tests.support.cluster.double import Cluster


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., Cluster]]:
    """Starts a cluster with quick times; keywords as for ``Cluster``."""
    clusters: list[Cluster] = []

    def make(**options: Any) -> Cluster:
        options = {"timing": QUICK} | options
        cluster = Cluster(tmp_path / str(len(clusters)) / "kubeconfig", images=[IMAGE], **options)
        clusters.append(cluster.__enter__())
        return cluster

    yield make
    for cluster in clusters:
        cluster.__exit__(None, None, None)


@pytest.fixture
def cluster(start: Callable[..., Cluster]) -> Cluster:
    return start()


@pytest.fixture
def api(cluster: Cluster) -> CoreV1Api:
    return api_of(cluster)
