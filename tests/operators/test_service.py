"""The single-machine Airflow: it works, listens on loopback only, heals itself, and leaves no process behind.

All with real processes. The tests share one service; those further down kill it in one way after the other.
"""

from __future__ import annotations

import ipaddress
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest

from operators import processes, service, warm
from operators.processes import Identity, is_alive, wait_until
from operators.service import AlreadyRunning, ApiError, Client, Service, ServiceError, find, main, start
from operators.service_settings import SUPERVISED, Home, warm_parent_name
from operators.service_state import State
from operators.service_supervisor import _UNHEALTHY_LIMIT

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes can only be ended reliably on Linux"),
]

TIMEOUT = 300.0
"""Seconds after which something counts as stuck, on a busy machine, too."""
WIDE = 120
"""Tasks of the DAG ``wide``: more than a page."""

DAGS = f"""
from airflow.providers.standard.operators.bash import BashOperator
from airflow.providers.standard.operators.empty import EmptyOperator
from airflow.providers.standard.operators.python import PythonOperator
from airflow.sdk import DAG, Param


def write(path):
    import os

    with open(path, "w") as file:
        file.write(os.environ["SERVICE_TEST"])


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
        (self.folder / "go").touch()

    def wait_until_ended(self) -> str:
        def state() -> str:
            return str(self.client.get(f"dags/tasks/dagRuns/{self.id}")["state"])

        wait_until(lambda: state() in ("success", "failed"), TIMEOUT, poll=0.3)
        return state()


def everything(home: Path) -> list[psutil.Process]:
    """All processes of the service."""
    state = State.read(Home(home))
    assert state is not None
    roots = [identity.process() for identity in (state.guard, state.supervisor)]
    found = {process.pid: process for root in roots if root is not None for process in processes.tree(root)}
    return list(found.values())


def each(found: list[psutil.Process], fact: Callable[[psutil.Process], Any]) -> Iterator[tuple[psutil.Process, Any]]:
    """What is to be known of each process that has not ended meanwhile."""
    for process in found:
        with suppress(psutil.NoSuchProcess):
            yield process, fact(process)


def assert_gone(found: list[psutil.Process], home: Path | None, timeout: float = TIMEOUT) -> None:
    """Wait until none of those processes is alive, and no other of the service in this home."""
    assert len(found) > 1
    wait_until(lambda: not any(is_alive(process) for process in found), timeout)
    assert [process for process in found if is_alive(process)] == []
    assert home is None or processes.with_variable(SUPERVISED, str(home)) == []


def wait_for_dags(client: Client) -> None:
    def known() -> set[str]:
        return {row["dag_id"] for row in client.pages("dags", "dags")}

    assert wait_until(lambda: known() == {"tasks", "wide"}, TIMEOUT, poll=0.3)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A home; whatever runs in it at the end is killed."""
    path = tmp_path_factory.mktemp("service") / "home"
    yield path
    for process in processes.with_variable(SUPERVISED, str(path)):
        process.kill()
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
    # A dead scheduler's tasks are looked for sooner than by default: tuning that the environment may change …
    "AIRFLOW__SCHEDULER__SCHEDULER_HEALTH_CHECK_THRESHOLD": "10",
    "AIRFLOW__SCHEDULER__ORPHANED_TASKS_CHECK_INTERVAL": "3",
    # … and what it may not.
    "AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_ASYNC": "postgresql+asyncpg://production/airflow",
    "AIRFLOW__API__HOST": "0.0.0.0",
    "AIRFLOW__CORE__EXECUTOR": "CeleryExecutor",
    "HTTP_PROXY": "http://127.0.0.1:9",
}


@pytest.fixture(scope="module")
def running(home: Path, dags: Path) -> Service:
    return start(home, dags=dags, parallelism=2, environment=ENVIRONMENT, with_parent=True, durable=False)


@pytest.fixture(scope="module")
def client(running: Service) -> Iterator[Client]:
    with Client(running) as opened:
        wait_for_dags(opened)
        yield opened


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


def test_status_of_a_running_service(running: Service, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(home) == running
    # On a busy machine, a component's last sign of life can be older than it should be for a moment.
    assert wait_until(lambda: call(capsys, "status", "--home", home)[0] == 0, TIMEOUT)
    code, output, _ = call(capsys, "status", "--home", home, "--json")
    report = json.loads(output)
    assert (code, report["healthy"], report["url"], report["pid"]) == (0, True, running.url, running.pid)
    assert set(report["components"]) == {
        "warm-parent",
        "database",
        "api-server",
        "scheduler",
        "dag-processor",
        "triggerer",
    }
    assert all(component["healthy"] and component["pid"] for component in report["components"].values())
    code, output, _ = call(capsys, "status", "--home", home)
    assert code == 0 and running.url in output and "NOT" not in output
    assert running.password not in output


def test_listens_on_loopback_only(client: Client, home: Path) -> None:
    found = everything(home)
    listening = {
        connection.laddr
        for process in found
        for connection in process.net_connections("inet")
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    }
    assert listening
    assert all(ipaddress.ip_address(address.ip).is_loopback for address in listening), listening


def test_secrets_are_private(client: Client, home: Path) -> None:
    assert home.stat().st_mode & 0o077 == 0
    for name in ("airflow.cfg", "keys.json", "passwords.json", "service.json"):
        assert (home / name).stat().st_mode & 0o777 == 0o600, name
    logs = list((home / "logs").glob("*.log"))
    assert len(logs) >= 4
    for log in logs:
        assert log.stat().st_mode & 0o777 == 0o600, log
        assert client._service.password not in log.read_text()
    assert len(json.loads((home / "keys.json").read_text())["jwt"]) >= 64


def test_run_succeeds_and_its_log_is_read_while_it_runs(client: Client, tmp_path: Path, home: Path) -> None:
    run = Run(client, tmp_path / "run")
    run.wait_until_started()
    path = f"dags/tasks/dagRuns/{run.id}/taskInstances/wait/logs/1"

    def log() -> str:
        return json.dumps(client.get(path)["content"])

    assert wait_until(lambda: '"waiting"' in log(), TIMEOUT, poll=0.3), log()
    assert "Could not read" not in log()
    run.go()
    assert run.wait_until_ended() == "success"
    assert (run.folder / "written").read_text() == "from the environment"
    assert "Traceback" not in (home / "logs" / "api-server.log").read_text()


def test_client_shows_what_the_api_says(client: Client) -> None:
    with pytest.raises(ApiError, match="`nothing` was not found") as missing:
        client.get("dags/nothing")
    assert missing.value.status_code == 404
    with pytest.raises(ApiError, match="folder"):
        client.post("dags/tasks/dagRuns", {"logical_date": None, "conf": {"folder": ""}})
    with pytest.raises(ApiError, match=r"body\.logical_date: Field required"):
        client.post("dags/tasks/dagRuns", {})


@pytest.mark.parametrize("expired", [True, False])
def test_client_logs_in_again_when_its_token_is_refused(expired: bool, client: Client, home: Path) -> None:
    client.get("dags/tasks")
    assert client._token is not None
    key = json.loads((home / "keys.json").read_text())["jwt"] if expired else 100 * "another key"
    claims = jwt.decode(client._token, options={"verify_signature": False})
    claims |= {"exp": claims["iat"] - 1000} if expired else {}
    client._token = bad = jwt.encode(claims, key, "HS512", headers=jwt.get_unverified_header(client._token))
    assert client._http.get("/api/v2/dags", headers={"Authorization": f"Bearer {bad}"}).status_code in (401, 403)
    assert client.get("/api/v2/dags/tasks")["dag_id"] == "tasks"
    assert client._token != bad


def test_client_reads_all_pages(client: Client) -> None:
    run = client.post("dags/wide/dagRuns", {"logical_date": None, "conf": {}})
    rows = list(client.pages(f"dags/wide/dagRuns/{run['dag_run_id']}/taskInstances", "task_instances"))
    assert len({row["task_id"] for row in rows}) == len(rows) == WIDE
    assert client.patch("dags/wide", {"is_paused": True})["is_paused"] is True


def test_many_change_something_at_once(client: Client) -> None:
    """Each change also writes an entry of Airflow's log, on the server's event loop: nobody may have to wait for that."""

    def add(number: int) -> None:
        client.post("variables", {"key": f"variable_{number}", "value": "any"})

    with ThreadPoolExecutor(64) as pool:
        list(pool.map(add, range(128)))
    assert client.get("variables")["total_entries"] == 128
    assert client.get("eventLogs", event="post_variable")["total_entries"] == 128


def test_airflow_command_sees_the_service(running: Service, home: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AIRFLOW__")}
    command = [sys.executable, "-m", "airflow", "dags", "list", "--output", "json"]
    output = subprocess.run(
        command,
        env=environment | {"AIRFLOW_HOME": str(home)},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
        check=True,
    )
    assert {row["dag_id"] for row in json.loads(output.stdout.splitlines()[-1])} == {"tasks", "wide"}


def test_second_one_in_the_same_home(
    running: Service, home: Path, dags: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, output, _ = call(capsys, "up", "--home", home, "--dags", dags, "--detach")
    assert code == 0 and running.url in output
    code, _, error = call(capsys, "up", "--home", home, "--dags", dags)
    assert code == 75 and running.url in error
    with pytest.raises(AlreadyRunning, match=running.url):
        start(home, dags=dags)
    assert find(home) == running


def test_tasks_wait_longer_for_an_api_server_than_the_service_takes_to_replace_it(running: Service) -> None:
    code = (
        "import json; from airflow.sdk.api import client as c; from airflow.sdk.execution_time import supervisor as s; "
        "print(json.dumps([c.API_RETRIES, c.API_RETRY_WAIT_MIN, c.API_RETRY_WAIT_MAX, s.HEARTBEAT_TIMEOUT]))"
    )
    environment = os.environ | {"AIRFLOW_HOME": str(running.home)}
    printed = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True)
    attempts, shortest, longest, heartbeat_timeout = json.loads(printed.stdout.splitlines()[-1])
    assert (attempts - 1) * shortest > _UNHEALTHY_LIMIT
    # A task that is silent for longer is taken for dead.
    assert (attempts - 1) * longest < heartbeat_timeout


@pytest.mark.long
def test_task_outlives_a_killed_api_server(client: Client, home: Path, tmp_path: Path) -> None:
    run = Run(client, tmp_path / "run")
    waiting = run.wait_until_started()
    state = State.read(Home(home))
    assert state is not None
    os.kill(state.components["api-server"].pid, signal.SIGKILL)
    run.go()
    assert wait_until(lambda: service._report(Home(home))["healthy"], TIMEOUT)  # type: ignore[index]
    assert run.wait_until_ended() == "success"
    assert not is_alive(waiting)


@pytest.mark.long
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
def test_dead_scheduler_is_replaced_and_its_tasks_run_again(
    client: Client, home: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """Also one that hangs, as when it waits for its tasks after it has lost the database; they must not count as failed."""
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
    assert wait_until(lambda: service._report(Home(home))["healthy"], TIMEOUT)  # type: ignore[index]


@pytest.mark.long
@pytest.mark.parametrize("names", [["database"], ["dag-processor", "triggerer"], ["everything"]])
def test_killed_components_are_replaced_and_the_run_completes(
    client: Client, home: Path, tmp_path: Path, names: list[str]
) -> None:
    run = Run(client, tmp_path / "run")
    run.wait_until_started()
    before = State.read(Home(home))
    assert before is not None
    killed = [identity for name, identity in before.components.items() if name in names or names == ["everything"]]
    assert killed
    for identity in killed:
        os.kill(identity.pid, signal.SIGKILL)

    def replaced() -> bool:
        state, report = State.read(Home(home)), service._report(Home(home))
        running = state.components.values() if state else ()
        return report is not None and report["healthy"] and not set(killed) & set(running)

    assert wait_until(replaced, TIMEOUT, poll=0.3)
    run.go()
    assert run.wait_until_ended() == "success"
    state = State.read(Home(home))
    assert state is not None and (state.guard, state.supervisor) == (before.guard, before.supervisor)


@pytest.mark.long
def test_the_service_does_without_a_warm_parent_that_does_not_stay(client: Client, home: Path, tmp_path: Path) -> None:
    """One that makes way for new code is followed by the next, however often; one that dies again and again is left out."""

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


@pytest.mark.long
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
    # The kernel ends Airflow's processes, the forked ones too; not the program that a task has started.
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


def test_stop_leaves_nothing(client: Client, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(client, tmp_path / "run").wait_until_started()
    found = everything(home)
    assert call(capsys, "down", "--home", home)[:2] == (0, "stopped\n")
    assert_gone(found, home, timeout=0)
    # The task was asked to end, and could still tell that it did.
    assert "final_state=failed" in (home / "logs" / "scheduler.log").read_text()
    code, output, _ = call(capsys, "down", "--home", home)
    assert code == 0 and "nothing runs" in output


@pytest.mark.long
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


UP = [sys.executable, "-m", "operators.service", "up", "--no-fsync"]


def wait_until_begun(home: Path) -> State:
    """Wait until the first components of a service have been started."""

    def begun() -> bool:
        state = State.read(Home(home))
        return state is not None and len(state.components) > 2

    assert wait_until(begun, TIMEOUT)
    state = State.read(Home(home))
    assert state is not None
    return state


@pytest.fixture
def foreground(home: Path, dags: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service in the foreground, as soon as its first components have been started."""
    process = subprocess.Popen([*UP, f"--home={home}", f"--dags={dags}"], stderr=subprocess.DEVNULL)
    try:
        assert wait_until_begun(home).guard.pid == process.pid
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_ends_everything(number: signal.Signals, foreground: subprocess.Popen[bytes], home: Path) -> None:
    found = everything(home)
    foreground.send_signal(number)
    assert foreground.wait(TIMEOUT) == 0
    assert_gone(found, home, timeout=0)


def test_killed_guard_leaves_nothing(foreground: subprocess.Popen[bytes], home: Path) -> None:
    found = everything(home)
    foreground.kill()
    foreground.wait()
    assert_gone(found, home)
    assert not (home / "service.json").exists()


def test_ends_with_the_process_that_started_it(home: Path, dags: Path) -> None:
    starter = "import subprocess, sys; subprocess.run(sys.argv[1:])"
    command = [*UP, f"--home={home}", f"--dags={dags}", "--with-parent"]
    process = subprocess.Popen([sys.executable, "-c", starter, *command], stderr=subprocess.DEVNULL)
    try:
        wait_until_begun(home)
        found = everything(home)
    finally:
        process.kill()
        process.wait()
    assert_gone(found, home)
    assert not (home / "service.json").exists()


def test_what_is_left_when_all_watchers_are_killed_is_cleaned_up(
    foreground: subprocess.Popen[bytes], home: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = everything(home)
    state = State.read(Home(home))
    assert state is not None
    # What a task's program would be: the kernel does not end it, and nobody is left to do so.
    program = subprocess.Popen(["sleep", "600"], env={**os.environ, SUPERVISED: str(home)})
    for identity in (state.supervisor, state.guard):
        os.kill(identity.pid, signal.SIGKILL)
    foreground.wait()
    wait_until(lambda: not any(is_alive(one) for one in found), TIMEOUT)
    assert [one for one in found if is_alive(one)] == []
    assert (home / "service.json").exists()
    assert call(capsys, "status", "--home", home)[0] == 3
    assert program.poll() is None
    assert call(capsys, "down", "--home", home)[0] == 0
    assert not (home / "service.json").exists()
    assert program.wait(TIMEOUT) == -signal.SIGTERM


def test_failed_start_shows_the_log(dags: Path, tmp_path: Path) -> None:
    home = tmp_path / "home"
    # A database of one's own is taken instead of the private one. Nobody answers at this port.
    conn = "postgresql+psycopg2://lab@127.0.0.1:9/airflow"
    with pytest.raises(ServiceError, match="can't be set up") as failed:
        start(home, dags=dags, environment={"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": conn})
    assert 'connection to server at "127.0.0.1", port 9 failed' in str(failed.value) and "migrate.log" in str(
        failed.value
    )
    assert not (home / "postgres").exists()
    assert processes.with_variable(SUPERVISED, str(home)) == []


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--dags", "{tmp}/missing"], 66, "no folder"),
        (["--home", "{tmp}/file"], 64, "choose another one with --home"),
        (["--port", "70000"], 64, "between 0"),
        (["--port", "{taken}"], 1, "is in use"),
        (["--parallelism", "0"], 64, "at least 1"),
        (["--timeout", "0"], 64, "more than 0"),
        (["--with-parent", "999999999"], 64, "no process"),
        (["--colour", "blue"], 64, "--colour"),
        (["--home", "{tmp}/old"], 1, "is an SQLite database of an earlier version"),
    ],
)
def test_mistakes_are_told_in_a_line(
    arguments: list[str], code: int, message: str, dags: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import socket

    (tmp_path / "file").touch()
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "airflow.db").touch()
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        names: dict[str, Any] = {"tmp": tmp_path, "taken": taken.getsockname()[1]}
        given = [argument.format(**names) for argument in arguments]
        outcome = call(capsys, "up", "--home", tmp_path / "home", "--dags", dags, *given)
    assert outcome[0] == code
    last = outcome[2].splitlines()[-1]
    assert last.startswith("chunkflow-airflow") and message in last
