"""What the tests of the service share: DAGs, runs of one, its processes, its command."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import psutil
import pytest

from operators.service import Client, processes
from operators.service.__main__ import main
from operators.service.processes import is_alive, wait_until
from operators.service.settings import SUPERVISED, Home
from operators.service.state import State

Answer = TypeVar("Answer")

TIMEOUT = 300.0
"""Seconds after which something counts as stuck, on a busy machine, too."""
WIDE = 120
"""The number of tasks of the DAG ``wide``: more than a page of the API."""

DAGS = f"""
from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG, Param


def write(path):
    import os

    with open(path, "w") as file:
        file.write(os.environ["SERVICE_TEST"] + os.environ.get("_AIRFLOW__AS_LIBRARY", ""))


with DAG("tasks", schedule=None, params={{"folder": Param("", type="string", minLength=1)}}):
    PythonOperator(task_id="write", python_callable=write, op_args=["{{{{ params.folder }}}}/written"])
    # In the bash that Airflow starts a sleep, which no signal at the parent's death reaches.
    BashOperator(
        task_id="wait",
        bash_command="echo waiting; cd {{{{ params.folder }}}}; sleep 600 & echo $! >> started; "
        "while [ ! -e go ]; do sleep 0.2; done; kill $!",
    )

with DAG("wide", schedule=None, is_paused_upon_creation=True):
    for number in range({WIDE}):
        EmptyOperator(task_id=f"empty_{{number}}")
"""


class Run:
    """A run of the DAG ``tasks``, whose second task waits until it is told to go on."""

    def __init__(self, client: Client, folder: Path) -> None:
        folder.mkdir()
        self.folder = folder
        self.client = client
        body = {"logical_date": None, "conf": {"folder": str(folder)}}
        self.id = client.post("dags/tasks/dagRuns", body)["dag_run_id"]

    def wait_until_started(self, times: int = 1) -> psutil.Process:
        """The sleep below the waiting task, when that has been started so many times."""
        started = self.folder / "started"
        assert wait_until(lambda: started.exists() and started.read_text().count("\n") >= times, TIMEOUT)
        return psutil.Process(int(started.read_text().split()[-1]))

    def go(self) -> None:
        """Let the waiting task end."""
        (self.folder / "go").touch()

    def wait_until_ended(self) -> str:
        """Wait until the run has ended; the state it ended in."""

        def state() -> str:
            return str(self.client.get(f"dags/tasks/dagRuns/{self.id}")["state"])

        wait_until(lambda: state() in ("success", "failed"), TIMEOUT, poll=0.3)
        return state()


def everything(home: Path) -> list[psutil.Process]:
    """All processes of the service in this home."""
    state = State.read(Home(home))
    assert state is not None
    roots = [identity.process() for identity in (state.guard, state.supervisor)]
    found = {process.pid: process for root in roots if root is not None for process in processes.tree(root)}
    return list(found.values())


def asked(
    found: list[psutil.Process], question: Callable[[psutil.Process], Answer]
) -> list[tuple[psutil.Process, Answer]]:
    """Processes with their answers, without those that have ended since they were listed."""
    answers = []
    for process in found:
        with suppress(psutil.NoSuchProcess):
            answers.append((process, question(process)))
    return answers


def assert_gone(found: list[psutil.Process], home: Path | None, timeout: float = TIMEOUT) -> None:
    """Wait until none of those processes is alive, and no other of the service in this home."""
    assert len(found) > 1
    wait_until(lambda: not any(is_alive(process) for process in found), timeout)
    assert [process for process in found if is_alive(process)] == []
    if home is not None:
        assert processes.with_variable(SUPERVISED, str(home)) == []
        assert [process for process, logs in asked(list(psutil.process_iter()), logs_below(home)) if logs] == []


def logs_below(home: Path) -> Callable[[psutil.Process], bool]:
    """A function that says whether a process has a log of this service open.

    Forked components have nothing of it in their first environment.
    """

    def opened(process: psutil.Process) -> bool:
        with suppress(OSError):
            for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
                with suppress(OSError):
                    if descriptor.readlink().is_relative_to(home / "logs"):
                        return True
        return False

    return opened


def as_user(user: str) -> list[str]:
    """What to put before a command line to run it as another user.

    An ordinary user then still reaches folders that are root's alone, as those of tests are.
    """
    if os.geteuid() != 0 or user == "root":
        return []
    rights = ["--inh-caps=-all,+dac_override", "--ambient-caps=-all,+dac_override"]
    return ["setpriv", "--reuid=nobody", "--clear-groups", *rights, "--"]


def call(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code and output of ``chunkflow-airflow``, which never shows a traceback."""
    capsys.readouterr()
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as ending:  # argparse
        code = int(ending.code or 0)
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err, printed.err
    return code, printed.out, printed.err
