"""Volumes in a real Airflow, as a test sees them: through the REST API.

Only what is waited for is asked of the database: for an answer the API takes twenty times as long,
from all that runs beside the test.
"""

from __future__ import annotations

import configparser
import re
import shutil
import time
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import psycopg2

import dags
from operators.service import Client

RUN_LIMIT = 300.0
"""Seconds after which a run counts as stuck."""


ENVIRONMENT = {
    # What tests write they have read at once (:meth:`Volumes.parsed`); again and again, it would
    # only take time from them.
    "AIRFLOW__DAG_PROCESSOR__MIN_FILE_PROCESS_INTERVAL": "300",
    # What has changed a second time within half a minute need not wait for the rest of it.
    "AIRFLOW__CORE__MIN_SERIALIZED_DAG_UPDATE_INTERVAL": "1",
    # New DAG files are found in seconds.
    "AIRFLOW__DAG_PROCESSOR__REFRESH_INTERVAL": "5",
}
"""Environment variables that tune an Airflow for tests."""


@dataclass(frozen=True)
class Volumes:
    """An Airflow and the folder of its specs."""

    client: Client
    folder: Path
    dags: Path
    """The tests' own copy of the DAG files."""
    home: Path
    """The home of the service."""

    def trigger(self, name: str, **conf: Any) -> str:
        """Start a run with these parameters; the run's id."""
        return str(self.client.post(f"dags/{name}/dagRuns", {"logical_date": None, "conf": conf})["dag_run_id"])

    def wait(self, name: str, run: str, limit: float = RUN_LIMIT) -> str:
        """Wait until a run has ended; the state it ended in."""
        ended = "SELECT 1 FROM dag_run WHERE dag_id = %s AND run_id = %s AND state IN ('success', 'failed')"
        until(lambda: self._ask(ended, name, run), limit)
        return str(self.client.get(f"dags/{name}/dagRuns/{run}")["state"])

    def now(self, name: str, run: str, task: str) -> tuple[str | None, int]:
        """The state of a task, None before it has one, and the number of its try."""
        state = "SELECT state, try_number FROM task_instance WHERE dag_id = %s AND run_id = %s AND task_id = %s"
        ((found, attempt),) = self._ask(state, name, run, task)
        return found, attempt

    @cached_property
    def _connection(self) -> psycopg2.extensions.connection:
        connection = connect_to_database(self.home)
        connection.autocommit = True
        return connection

    def _ask(self, statement: str, *values: Any) -> list[tuple[Any, ...]]:
        with self._connection.cursor() as cursor:
            cursor.execute(statement, values)
            return cursor.fetchall()

    def tasks(self, name: str, run: str) -> dict[str, dict[str, Any]]:
        """The task instances of a run, by task id."""
        path = f"dags/{name}/dagRuns/{run}/taskInstances"
        return {task["task_id"]: task for task in self.client.pages(path, "task_instances")}

    def log(self, name: str, run: str, task: str, attempt: int) -> str:
        """The log of one try of a task."""
        path = f"dags/{name}/dagRuns/{run}/taskInstances/{task}/logs/{attempt}"
        lines = self.client.get(path, full_content=True)["content"]
        return "\n".join(f"{line['event']} {line.get('error_detail') or ''}" for line in lines)

    def state(self, name: str, run: str, task: str) -> dict[str, Any]:
        """What a task remembers between its tries, by key."""
        path = f"dags/{name}/dagRuns/{run}/taskInstances/{task}/state-store"
        return {entry["key"]: entry["value"] for entry in self.client.get(path)["task_state_store"]}

    def runs(self, name: str) -> list[dict[str, Any]]:
        """All runs of a DAG."""
        return list(self.client.pages(f"dags/{name}/dagRuns", "dag_runs"))

    def assets(self, uri: str) -> list[dict[str, Any]]:
        """The assets with just this URI."""
        found = self.client.pages("assets", "assets", uri_pattern=uri)
        return [asset for asset in found if asset["uri"] == uri]

    def known(self, *names: str) -> None:
        """Wait until Airflow has the DAGs of these names."""
        found = "SELECT dag_id FROM dag WHERE dag_id = ANY(%s) AND NOT is_stale"
        self.parsed(lambda: len(self._ask(found, list(names))) == len(names))

    def parsed(self, condition: Callable[[], Any], file: str = "chunkflow_volumes.py") -> Any:
        """Wait for what a new spec brings about in a DAG file; what ``condition`` gives then.

        The file is touched: Airflow reads files that have changed at once, others only now and
        then.
        """
        end = time.monotonic() + 90
        while not (value := condition()):
            assert time.monotonic() < end, "waited in vain"
            (self.dags / file).touch()
            with suppress(TimeoutError):
                return until(condition, 10)
        return value

    def clear(self, name: str, run: str, tasks: list[str]) -> None:
        """Clear tasks and what comes after them, as the UI does."""
        self.client.post(
            f"dags/{name}/clearTaskInstances",
            {"dag_run_id": run, "task_ids": tasks, "include_downstream": True, "dry_run": False, "only_failed": False},
        )


def until(condition: Callable[[], Any], seconds: float, poll: float = 0.4) -> Any:
    """Wait until a condition is true, asking every ``poll`` seconds; what it gives then.

    ``TimeoutError``: it isn't within so many seconds.
    """
    end = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > end:
            raise TimeoutError("waited in vain")
        time.sleep(poll)
    return value


def change_database(home: Path, statement: str, *values: Any) -> None:
    """Run a statement of SQL on the database of the service in this home, behind Airflow's back."""
    with closing(connect_to_database(home)) as connection, connection, connection.cursor() as cursor:
        cursor.execute(statement, values)


def connect_to_database(home: Path) -> psycopg2.extensions.connection:
    """A connection to the database of the service in this home."""
    settings = configparser.ConfigParser()
    settings.read(home / "airflow.cfg")
    return psycopg2.connect(settings["database"]["sql_alchemy_conn"].replace("+psycopg2", ""))


def copy_dags(folder: Path) -> Path:
    """Copy the DAG files of the project; the new folder, ``dags`` below ``folder``."""
    copy = folder / "dags"
    shutil.copytree(Path(dags.__file__).parent, copy, ignore=shutil.ignore_patterns("volumes", "__pycache__"))
    return copy


def write_own_dag(folder: Path) -> None:
    """Write the DAG of ``docs/your-own-dag.md`` into a folder of DAG files.

    Its spec is ``membrane.yaml`` there.
    """
    page = Path(__file__).parents[3] / "docs" / "your-own-dag.md"
    (example,) = re.findall(r"^```python\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)
    (folder / "own_dag.py").write_text(example)


def files(folder: Path) -> dict[str, bytes]:
    """The storage chunks of a layer: their bytes, by path in the layer's folder."""
    found = (file for file in folder.glob("*_*_*/*"))
    return {str(file.relative_to(folder)): file.read_bytes() for file in found}
