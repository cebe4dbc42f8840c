"""The one-machine Airflow under users who click while tasks start and end: how long an answer takes, on PostgreSQL and on SQLite.

    python bench/clicks.py                                       # both databases, some minutes
    python bench/clicks.py --requests 40 --databases postgresql  # a look

A real service; a DAG of six tasks that do nothing, runs of which follow each other; four clients that trigger runs, clear tasks and
write notes as fast as they get answers; and a process for each core that only burns it. Then, without clients and burners, a DAG of
128 tasks goes through the scheduler. SQLite is used as ``AIRFLOW__DATABASE__SQL_ALCHEMY_CONN`` gives it to the service.
"""

from __future__ import annotations

import argparse
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

from tqdm import tqdm

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
    """What clients got."""

    seconds: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)

    @property
    def slow(self) -> int:
        """Answers that took too long."""
        return sum(one > SLOW for one in self.seconds)


class User(threading.Thread):
    """Triggers, clears and annotates until so many requests are made in all, or the time is over."""

    def __init__(self, service: Service, answers: Answers, bar: tqdm[None], end: float) -> None:
        super().__init__(daemon=True)
        self._service, self._answers, self._bar, self._end = service, answers, bar, end

    def run(self) -> None:
        with Client(self._service, timeout=90) as client:
            while self._bar.n < self._bar.total and time.monotonic() < self._end:
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
    """So many processes that only burn."""
    processes = [multiprocessing.get_context("spawn").Process(target=burn, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.join()


def wait_for(client: Client, dag: str, limit: float) -> None:
    """Wait until Airflow has a DAG."""
    end = time.monotonic() + limit
    while dag not in {row["dag_id"] for row in client.pages("dags", "dags")}:
        if time.monotonic() > end:
            raise TimeoutError(f"Airflow does not find the DAG {dag}")
        time.sleep(0.5)


def through_the_scheduler(client: Client, limit: float) -> float | None:
    """Seconds of a run of the wide DAG; ``None`` if it does not end in time."""
    began = time.monotonic()
    run = client.post("dags/wide/dagRuns", {"logical_date": None, "conf": {}})["dag_run_id"]
    while client.get(f"dags/wide/dagRuns/{run}")["state"] not in ("success", "failed"):
        if time.monotonic() > began + limit:
            return None
        time.sleep(0.2)
    return time.monotonic() - began


def measure(database: str, options: argparse.Namespace) -> str:
    """A row of the table."""
    with tempfile.TemporaryDirectory(prefix="clicks-") as folder:
        dags = Path(folder) / "dags"
        dags.mkdir()
        (dags / "many.py").write_text(DAGS % options.tasks)
        conn = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": f"sqlite:///{folder}/airflow.db"} if database == "sqlite" else {}
        with start(Path(folder) / "home", dags=dags, environment=conn) as service, Client(service) as client:
            wait_for(client, "wide", 120)
            wide = through_the_scheduler(client, options.limit)
            answers = Answers()
            with burners(options.burn), tqdm(total=options.requests, desc=database, unit="request") as bar:
                users = [User(service, answers, bar, time.monotonic() + options.limit) for _ in range(options.clients)]
                began = time.monotonic()
                for user in users:
                    user.start()
                for user in users:
                    user.join()
                took = time.monotonic() - began
    cells = [
        database,
        str(len(answers.seconds)),
        f"{took:.0f} s",
        str(len(answers.errors)),
        str(answers.slow),
        f"{median(answers.seconds):.2f} s",
        f"{max(answers.seconds):.1f} s",
        "–" if wide is None else f"{wide:.1f} s",
    ]
    for error in sorted(set(answers.errors))[:3]:
        print(f"{database}: {error[:300]}", file=sys.stderr)
    return f"| {' | '.join(cells)} |"


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    rows = [measure(database, options) for database in options.databases]
    print(f"\n| database | requests | in | errors | over {SLOW:.0f} s | median | slowest | {options.tasks} tasks |")
    print("\n".join(["| --- | --- | --- | --- | --- | --- | --- | --- |", *rows]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
