"""What the tests of this folder share."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from airflow_volumes import ENVIRONMENT, Volumes, copy_dags
from clusters import why_no_real_cluster
from failure_summary import remember_logs
from kubernetes_world import World, start_world

from operators.service import Client, start

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


_services = ExitStack()
"""Those that run."""


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(nextitem: pytest.Item | None) -> None:
    """End the services after the last test of this folder: one that waits for all other tests to end takes a tenth of a core from them."""
    if nextitem is None or Path(__file__).parent not in nextitem.path.parents:
        _services.close()


@pytest.fixture(scope="session", params=_WHERE)
def airflow_and_cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    """An Airflow and a cluster for all tests with pods."""
    folder = tmp_path_factory.mktemp("kubernetes")
    remember_logs(request, folder / "home" / "logs")
    request.addfinalizer(_services.close)
    return _services.enter_context(start_world(folder, request.param))


@pytest.fixture
def world(airflow_and_cluster: World) -> Iterator[World]:
    """The same, with volumes of the test's own."""
    yield airflow_and_cluster
    airflow_and_cluster.remove_all()


@pytest.fixture(scope="session")
def local_volumes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Volumes]:
    """An Airflow for all tests without pods; for a name, a folder of its own, whose ``volumes`` it looks at.

    Modules in a folder's ``modules`` can be imported by it.
    """
    root = tmp_path_factory.mktemp("local")
    dags, home, names = copy_dags(root), root / "home", ("airflow", "recurring")
    for name in names:
        for folder in ("volumes", "modules"):
            (root / name / folder).mkdir(parents=True)
    modules = [str(root / name / "modules") for name in names]
    environment = ENVIRONMENT | {
        "CHUNKFLOW_VOLUMES": os.pathsep.join(str(root / name / "volumes") for name in names),
        "PYTHONPATH": os.pathsep.join([*modules, *filter(None, [os.environ.get("PYTHONPATH")])]),
    }
    remember_logs(request, home / "logs")
    request.addfinalizer(_services.close)
    service = start(home, dags=dags, environment=environment, with_parent=True, durable=False)
    client = _services.enter_context(Client(_services.enter_context(service)))
    return lambda name: Volumes(client, root / name, dags, home)
