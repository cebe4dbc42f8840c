"""The single-machine Airflow heals itself.

Parts of it are killed in one way after the other, and runs complete all the same.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from operators import warm
from operators.service import Client, Service, ServiceError, find, processes, start
from operators.service.processes import Identity, is_alive, wait_until
from operators.service.report import report_of
from operators.service.settings import SUPERVISED, Home, warm_parent_name
from operators.service.state import State
from tests.support.airflow.service import DAGS, TIMEOUT, Run, as_user, assert_gone, call, everything

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.long,
    pytest.mark.skipif(sys.platform != "linux", reason="processes can only be ended reliably on Linux"),
]


def each(found: list[psutil.Process], fact: Callable[[psutil.Process], Any]) -> Iterator[tuple[psutil.Process, Any]]:
    """What is to be known of each process that has not ended meanwhile."""
    for process in found:
        with suppress(psutil.NoSuchProcess):
            yield process, fact(process)


def wait_for_dags(client: Client) -> None:
    def known() -> set[str]:
        return {row["dag_id"] for row in client.pages("dags", "dags")}

    assert wait_until(lambda: known() == {"tasks", "wide"}, TIMEOUT, poll=0.3)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home; whatever runs in it at the end is killed."""
    path = tmp_path_factory.mktemp("service") / "home"
    yield path
    processes.send(processes.with_variable(SUPERVISED, str(path)), signal.SIGKILL)
    state = State.read(Home(path))
    for identity in (state.supervisor, state.guard) if state else ():
        os.kill(identity.pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def dags(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dags")
    (folder / "example.py").write_text(DAGS)
    return folder


ENVIRONMENT = {
    "SERVICE_TEST": "from the environment",
    # A dead scheduler's tasks are looked for sooner than by default. One that seems dead to itself
    # resets its own tasks: on a busy machine it may not show a sign of life in twice the time after
    # which it should.
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "20",
    "AIRFLOW__SCHEDULER__SCHEDULER_HEARTBEAT_SEC": "1",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "3",
}


@pytest.fixture(scope="module")
def running(home: Path, dags: Path) -> Service:
    return start(home, dags=dags, parallelism=2, environment=ENVIRONMENT, with_parent=True, durable=False)


@pytest.fixture(scope="module")
def client(running: Service) -> Iterator[Client]:
    with Client(running) as opened:
        wait_for_dags(opened)
        yield opened


def test_task_outlives_a_killed_api_server(client: Client, home: Path, tmp_path: Path) -> None:
    run = Run(client, tmp_path / "run")
    waiting = run.wait_until_started()
    state = State.read(Home(home))
    assert state is not None
    os.kill(state.components["api-server"].pid, signal.SIGKILL)
    run.go()
    assert wait_until(lambda: report_of(Home(home))["healthy"], TIMEOUT)  # type: ignore[index]
    assert run.wait_until_ended() == "success"
    assert not is_alive(waiting)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_dead_scheduler_is_replaced_and_its_tasks_run_again(
    client: Client, home: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Also one that hangs, as when it waits for its tasks after it has lost the database.

    They must not count as failed.
    """
    run = Run(client, tmp_path / "run")
    first = run.wait_until_started()
    state = State.read(Home(home))
    assert state is not None
    scheduler = state.components["scheduler"].process()
    assert scheduler is not None
    old = processes.tree(scheduler)
    assert first in old
    scheduler.send_signal(number)
    # What it had started must not go on beside what the next one starts.
    assert wait_until(lambda: not any(is_alive(process) for process in old), TIMEOUT)
    second = run.wait_until_started(times=2)
    assert is_alive(second) and not is_alive(first)
    run.go()
    assert run.wait_until_ended() == "success"
    assert "scheduler was killed by SIGKILL; starting it again" in (home / "logs" / "supervisor.log").read_text()
    assert wait_until(lambda: report_of(Home(home))["healthy"], TIMEOUT)  # type: ignore[index]


@pytest.mark.parametrize("names", [["database"], ["dag-processor", "triggerer"], ["everything"]])
def test_killed_components_are_replaced_and_the_run_completes(
    client: Client, home: Path, tmp_path: Path, names: list[str]
) -> None:
    run = Run(client, tmp_path / "run")
    run.wait_until_started()
    before = State.read(Home(home))
    kill(home, names)
    run.go()
    assert run.wait_until_ended() == "success"
    state = State.read(Home(home))
    assert state is not None and before is not None
    assert (state.guard, state.supervisor) == (before.guard, before.supervisor)


def kill(home: Path, names: list[str]) -> None:
    """Kill components at once, or all of them, and wait until they are replaced."""
    before = State.read(Home(home))
    assert before is not None
    killed = [identity for name, identity in before.components.items() if name in names or names == ["everything"]]
    assert killed
    for identity in killed:
        os.kill(identity.pid, signal.SIGKILL)

    def replaced() -> bool:
        state, report = State.read(Home(home)), report_of(Home(home))
        running = state.components.values() if state else ()
        return report is not None and report["healthy"] and not set(killed) & set(running)

    assert wait_until(replaced, TIMEOUT, poll=0.3)


def test_the_service_does_without_a_warm_parent_that_does_not_stay(client: Client, home: Path, tmp_path: Path) -> None:
    """One that makes way for new code is followed by the next, however often.

    One that dies again and again is left out.
    """

    def parent() -> Identity | None:
        state = State.read(Home(home))
        assert state is not None
        return state.components.get("warm-parent")

    def end(number: signal.Signals) -> None:
        assert wait_until(lambda: warm.answers(warm_parent_name(Home(home)) or ""), TIMEOUT)
        last = parent()
        assert last is not None
        os.kill(last.pid, number)
        assert wait_until(lambda: parent() not in (last, None) or left_out(), TIMEOUT)

    def left_out() -> bool:
        return "tasks start without it" in (home / "logs" / "supervisor.log").read_text()

    for _ in range(6):
        end(signal.SIGTERM)
    assert not left_out()
    while not left_out():
        end(signal.SIGKILL)
    run = Run(client, tmp_path / "run")
    run.wait_until_started()
    run.go()
    assert run.wait_until_ended() == "success"


def test_next_service_goes_on_where_one_was_killed_with_all_its_watchers(
    client: Client,
    home: Path,
    dags: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = Run(client, tmp_path / "run")
    first = run.wait_until_started()
    program = [first, *first.parents()[:1]]
    airflow = [p for p, name in each(everything(home), psutil.Process.name) if p not in program and name != "sleep"]
    state = State.read(Home(home))
    assert state is not None
    for identity in (state.supervisor, state.guard):
        os.kill(identity.pid, signal.SIGKILL)
    # The kernel ends Airflow's processes, the forked ones too; not the program that a task has
    # started.
    assert_gone(airflow, None)
    assert is_alive(first)
    assert (home / "service.json").exists()
    assert call(capsys, "status", "--home", home)[0] == 3
    with pytest.raises(ServiceError, match="does not answer"):
        client.get("dags")
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    code, output, _ = call(capsys, "up", "--home", home, "--dags", dags, "--detach")
    # The address is the same, so the client goes on, too.
    assert code == 0 and state.url in output
    assert not is_alive(first)
    run.wait_until_started(times=2)
    run.go()
    assert run.wait_until_ended() == "success"


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that an ordinary user may change.

    Airflow asks whether it may read DAG files, which whoever may read all does not show.
    """
    folder = Path(tempfile.mkdtemp())
    if os.geteuid() == 0:
        shutil.chown(folder, "nobody")
    yield folder
    processes.send(processes.with_variable(SUPERVISED, str(folder / "home")), signal.SIGKILL)
    shutil.rmtree(folder)


def test_two_side_by_side_one_of_an_ordinary_user(
    client: Client, home: Path, open_folder: Path, tmp_path: Path
) -> None:
    """All of one is killed while both run tasks.

    Both runs complete, and when it is ended the other one goes on.
    """
    (open_folder / "dags").mkdir()
    (open_folder / "dags" / "example.py").write_text(DAGS)
    other = open_folder / "home"
    command = [*as_user("ordinary"), sys.executable, "-P", "-m", "operators.service"]
    variables = os.environ | ENVIRONMENT | {"HOME": str(open_folder)}
    up = ["up", "--detach", "--no-fsync", f"--home={other}", f"--dags={open_folder / 'dags'}"]
    subprocess.run([*command, *up], env=variables, check=True, timeout=TIMEOUT)
    second = find(other)
    assert second is not None
    users = {user.real for _, user in each(everything(other), psutil.Process.uids)}
    assert len(users) == 1 and (users != {0})
    with Client(second) as its_client:
        wait_for_dags(its_client)
        runs = [Run(client, tmp_path / "run"), Run(its_client, open_folder / "run")]
        if os.geteuid() == 0:
            shutil.chown(open_folder / "run", "nobody")
        for run in runs:
            run.wait_until_started()
        kill(other, ["everything"])
        for run in runs:
            run.go()
        assert [run.wait_until_ended() for run in runs] == ["success", "success"]
    found = everything(other)
    subprocess.run([*command, "down", f"--home={other}"], env=variables, check=True, timeout=TIMEOUT)
    assert_gone(found, other, timeout=0)
    assert report_of(Home(home))["healthy"]  # type: ignore[index]


def test_killed_supervisor_leaves_nothing(dags: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    with start(home, dags=dags, environment=ENVIRONMENT, durable=False) as started, Client(started) as client:
        Run(client, tmp_path / "run").wait_until_started()
        found = everything(home)
        state = State.read(Home(home))
        assert state is not None
        os.kill(state.supervisor.pid, signal.SIGKILL)
        assert_gone(found, home)
        assert not (home / "service.json").exists()
