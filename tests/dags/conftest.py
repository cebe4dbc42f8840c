"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from clusters import why_no_real_cluster
from kubernetes_world import World, start_world

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


@pytest.fixture(scope="module", params=_WHERE)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """An Airflow and a cluster for a module's tests."""
    with start_world(tmp_path_factory.mktemp("kubernetes"), request.param) as world:
        yield world
