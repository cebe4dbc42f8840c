"""How long the one-machine Airflow takes to answer users while tasks start and end.

    python -m bench.clicks --requests 40 --databases postgresql     # a look
    python -m bench.clicks                                          # and SQLite, some minutes

A real service; a DAG of six tasks that do nothing, runs of which follow each other; four clients
that trigger runs, clear tasks and write notes as fast as they get answers; and a process for each
core that only burns it. Before that, without clients and burners, a DAG of 128 tasks goes through
the scheduler. SQLite is used as ``AIRFLOW__DATABASE__SQL_ALCHEMY_CONN`` gives it to the service.
Needs the extra ``airflow``.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tqdm import tqdm

from bench.common import command_line, table, trigger, wait_for_dag
from operators.service import ApiError, Client, Service, ServiceError, start

DAGS = """
from airflow.providers.standard.operators.bash import BashOperator
from airflow.sdk import DAG

with DAG("clicked", schedule=None, max_active_runs=4):
    for number in range(6):
        BashOperator(task_id=f"task_{number}", bash_command="true")
with DAG("wide", schedule=None):
    for number in range(%d):
        BashOperator(task_id=f"task_{number}", bash_command="true")
"""
DATABASES = ("postgresql", "sqlite")
SLOW = 10.0
"""Seconds from which an answer counts as one that did not come."""


@dataclass
class Answers:
    """What the service answered."""

    seconds: list[float] = field(default_factory=list)
    """How long each answer took, errors included."""
    errors: list[str] = field(default_factory=list)

    @property
    def slow(self) -> int:
        """Number of answers that took longer than ``SLOW``."""
        return sum(one > SLOW for one in self.seconds)


class User(threading.Thread):
    """Triggers runs, writes notes, clears tasks, until enough requests are made or time is up."""

    def __init__(self, service: Service, answers: Answers, bar: tqdm[Any], requests: int, end: float) -> None:
        """Prepare to click.

        Args:
            service: The service.
            answers: Where what all users get is kept.
            bar: Moved on with each answer.
            requests: How many answers all users want together.
            end: When to stop, as :func:`time.monotonic` tells.
        """
        super().__init__(daemon=True)
        self._service, self._answers, self._bar, self._requests, self._end = service, answers, bar, requests, end

    def run(self) -> None:
        """Click until enough answers have come or time is up."""
        with Client(self._service, timeout=90) as client:
            while len(self._answers.seconds) < self._requests and time.monotonic() < self._end:
                run = self._ask(client, "POST", "dags/clicked/dagRuns", {"logical_date": None, "conf": {}})
                if run is None:
                    continue
                self._ask(client, "PATCH", f"dags/clicked/dagRuns/{run}", {"note": "looks good"})
                clear = {"dag_run_id": run, "task_ids": ["task_0"], "dry_run": False, "only_failed": False}
                self._ask(client, "POST", "dags/clicked/clearTaskInstances", clear)

    def _ask(self, client: Client, method: str, path: str, body: dict[str, object]) -> str | None:
        began = time.monotonic()
        try:
            answer = client.post(path, body) if method == "POST" else client.patch(path, body)
            return str(answer.get("dag_run_id"))
        except (ApiError, ServiceError) as error:
            self._answers.errors.append(str(error))
            return None
        finally:
            self._answers.seconds.append(time.monotonic() - began)
            self._bar.update()


def burn() -> None:
    """Keep a core busy."""
    while True:
        sum(range(100_000))


@contextmanager
def burners(count: int) -> Iterator[None]:
    """Keep ``count`` cores busy."""
    processes = [multiprocessing.get_context("spawn").Process(target=burn, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def through_the_scheduler(client: Client, limit: float) -> float | None:
    """Run the wide DAG; give its seconds, or None if it does not end within ``limit`` seconds."""
    began = time.monotonic()
    run = trigger(client, "wide")
    while client.get(f"dags/wide/dagRuns/{run}")["state"] not in ("success", "failed"):
        if time.monotonic() > began + limit:
            return None
        time.sleep(0.2)
    return time.monotonic() - began


@dataclass(frozen=True)
class Load:
    """What a service has to stand."""

    requests: int
    """How many answers all clients want together."""
    clients: int
    burners: int
    """Processes that burn a core each."""
    tasks: int
    """Tasks of the wide DAG."""
    limit: float
    """Seconds after which clients stop."""


def measure(database: str, load: Load) -> list[str]:
    """Start a service on ``postgresql`` or ``sqlite`` and load it; give a line of the table."""
    with tempfile.TemporaryDirectory(prefix="clicks-") as folder:
        dags = Path(folder) / "dags"
        dags.mkdir()
        (dags / "many.py").write_text(DAGS % load.tasks)
        conn = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder}/airflow.db"} if database == "sqlite" else {}
        with start(Path(folder) / "home", dags=dags, environment=conn) as service, Client(service) as client:
            wait_for_dag(client, "wide")
            wide = through_the_scheduler(client, load.limit)
            answers, took = click(service, load, database)
    for error in sorted(set(answers.errors))[:3]:
        print(f"{database}: {error[:300]}", file=sys.stderr)
    return [
        database,
        str(len(answers.seconds)),
        f"{took:.0f} s",
        str(len(answers.errors)),
        str(answers.slow),
        f"{median(answers.seconds):.2f} s",
        f"{max(answers.seconds):.1f} s",
        "–" if wide is None else f"{wide:.1f} s",
    ]


def click(service: Service, load: Load, title: str) -> tuple[Answers, float]:
    """Let all clients click, while processes burn the cores.

    Returns:
        What the clients got, and the seconds until the last one ended.
    """
    answers = Answers()
    with burners(load.burners), tqdm(total=load.requests, desc=title, unit="request") as bar:
        began = time.monotonic()
        users = [User(service, answers, bar, load.requests, began + load.limit) for _ in range(load.clients)]
        for user in users:
            user.start()
        for user in users:
            user.join()
        return answers, time.monotonic() - began


def main() -> int:
    """Measure and print."""
    parser = command_line("clicks", __doc__)
    parser.add_argument("--databases", nargs="+", choices=DATABASES, default=DATABASES, help="default: both")
    parser.add_argument("--requests", type=int, default=500, help="of all clients together (default: 500)")
    parser.add_argument("--clients", type=int, default=4, help="default: 4")
    parser.add_argument(
        "--burn", type=int, default=os.cpu_count(), help="processes that burn a core (default: as many as cores)"
    )
    parser.add_argument(
        "--tasks", type=int, default=128, help="of the DAG that goes through the scheduler (default: 128)"
    )
    parser.add_argument("--limit", type=float, default=300.0, help="seconds after which clients stop (default: 300)")
    options = parser.parse_args()
    load = Load(options.requests, options.clients, options.burn, options.tasks, options.limit)
    header = ["database", "requests", "in", "errors", f"over {SLOW:.0f} s", "median", "slowest", f"{load.tasks} tasks"]
    print("\n" + table(header, [measure(database, load) for database in options.databases]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
