"""The Airflow without a cluster that the tests of several files share.

It ends as the one with a cluster does.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import ExitStack

import pytest

from operators.service import Client, start
from tests.support.airflow.failure_summary import remember_logs
from tests.support.airflow.volumes import ENVIRONMENT, Volumes, copy_dags

SERVICES = ExitStack()
"""The Airflows that run.

They end after the last test of their group (``tests/conftest.py``): one that waits for all other
tests to end takes a tenth of a core from them.
"""

_STRANGE = {
    "SERVICE_TEST": "from the environment",
    # What the environment may not change.
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": "postgresql+asyncpg://production/airflow",
    "AIRFLOW__API__HOST": "0.0.0.0",
    "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
    "HTTP_PROXY": "http://127.0.0.1:9",
}


@pytest.fixture(scope="session")
def local_volumes(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Volumes]:
    """An Airflow for all tests without pods, with a folder of its own for each name.

    Airflow looks at the folder's ``volumes``, and can import modules in its ``modules``.
    """
    root = tmp_path_factory.mktemp("local")
    dags, home, names = copy_dags(root), root / "home", ("airflow", "recurring", "service")
    for name in names:
        for folder in ("volumes", "modules"):
            (root / name / folder).mkdir(parents=True)
    modules = [str(root / name / "modules") for name in names]
    environment = (
        ENVIRONMENT
        | _STRANGE
        | {
            "CHUNKFLOW_VOLUMES": os.pathsep.join(str(root / name / "volumes") for name in names),
            "PYTHONPATH": os.pathsep.join([*modules, *filter(None, [os.environ.get("PYTHONPATH")])]),
        }
    )
    remember_logs(request, home / "logs")
    request.addfinalizer(SERVICES.close)
    service = start(home, dags=dags, environment=environment, with_parent=True, durable=False)
    client = SERVICES.enter_context(Client(SERVICES.enter_context(service)))
    return lambda name: Volumes(client, root / name, dags, home)
