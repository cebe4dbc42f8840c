"""What the tests of this folder share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.airflow.failure_summary import remember_logs
from tests.support.airflow.local import SERVICES
from tests.support.airflow.world import World, start_world
from tests.support.cluster.clusters import why_no_real_cluster

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


@pytest.fixture(scope="session", params=_WHERE)
def airflow_and_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """An Airflow and a cluster for all tests with pods."""
    folder = tmp_path_factory.mktemp("kubernetes")
    remember_logs(request, folder / "home" / "logs")
    request.addfinalizer(SERVICES.close)
    return SERVICES.enter_context(start_world(folder, request.param))


@pytest.fixture
def world(airflow_and_cluster: World) -> Iterator[World]:
    """The same, with volumes of the test's own."""
    yield airflow_and_cluster
    airflow_and_cluster.remove_all()
