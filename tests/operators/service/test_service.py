"""The single-machine Airflow.

It works, listens on loopback only, and leaves no process behind, however it is ended.

All with real processes, most with the one service that the tests of local volumes use before. What
it does when parts of it are killed is in ``test_killed.py``.
"""

from __future__ import annotations

import ipaddress
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import jwt
import psutil
import pytest

from operators.service import AlreadyRunning, ApiError, Client, Service, ServiceError, find, processes, start
from operators.service.health import COMPONENTS
from operators.service.processes import is_alive, wait_until
from operators.service.settings import SUPERVISED, Home
from operators.service.state import State
from operators.service.supervisor import _UNHEALTHY_LIMIT
from tests.support.airflow.service import DAGS, TIMEOUT, WIDE, Run, asked, assert_gone, call, everything
from tests.support.airflow.volumes import Volumes, connect_to_database

pytestmark = [
    pytest.mark.airflow,
    pytest.mark.skipif(sys.platform != "linux", reason="processes can only be ended reliably on Linux"),
]


@pytest.fixture(scope="module")
def volumes(local_volumes: Callable[[str], Volumes]) -> Volumes:
    volumes = local_volumes("service")
    (volumes.dags / "example.py").write_text(DAGS)
    volumes.known("tasks", "wide")
    return volumes


@pytest.fixture(scope="module")
def home(volumes: Volumes) -> Path:
    return volumes.home


@pytest.fixture(scope="module")
def dags(volumes: Volumes) -> Path:
    return volumes.dags


@pytest.fixture(scope="module")
def client(volumes: Volumes) -> Client:
    return volumes.client


@pytest.fixture(scope="module")
def running(home: Path) -> Service:
    found = find(home)
    assert found is not None
    return found


def test_status_of_a_running_service(running: Service, home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert find(home) == running
    # On a busy machine, a component's last sign of life can be older than it should be for a
    # moment.
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
    listening = {
        connection.laddr
        for _, connections in asked(everything(home), lambda process: process.net_connections("inet"))
        for connection in connections
        if connection.status in (psutil.CONN_LISTEN, psutil.CONN_NONE)
    }
    assert listening
    assert all(ipaddress.ip_address(address.ip).is_loopback for address in listening), listening


def test_components_are_forks_and_share_only_memory(client: Client, home: Path) -> None:
    state = State.read(Home(home))
    assert state is not None
    supervisor = state.supervisor.process()
    assert supervisor is not None and supervisor.num_threads() == 1, (
        "a lock that another thread holds would stay locked"
    )
    for name in COMPONENTS:
        process = state.components[name].process()
        assert process is not None and process.ppid() == supervisor.pid and os.getsid(process.pid) == process.pid
        assert name in " ".join(process.cmdline()).replace("_", "-")
        shared = re.findall(r"Shared_Dirty: +(\d+) kB", Path(f"/proc/{process.pid}/smaps_rollup").read_text())
        assert int(shared[0]) > 20_000, "what an executed program has written is its own"
        opened = set()
        for descriptor in Path(f"/proc/{process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                opened.add(str(descriptor.readlink()))
        assert str(home / "service.lock") not in opened
        assert str(home / "logs" / f"{name}.log") in opened


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


def test_of_two_that_wait_for_each_other_the_scheduler_gives_way(client: Client, home: Path) -> None:
    """It tries again. Else whoever marks a run at the wrong moment is answered with an error."""
    run = client.post("dags/wide/dagRuns", {"logical_date": None})["dag_run_id"]
    of_run = "FROM task_instance WHERE dag_id = 'wide' AND run_id = %s"
    blocked = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND query LIKE %s"
    with (
        closing(connect_to_database(home)) as request,
        closing(connect_to_database(home)) as obstacle,
        closing(connect_to_database(home)) as watch,
        request.cursor() as asking,
        obstacle.cursor() as holding,
        watch.cursor() as watching,
        ThreadPoolExecutor(1) as thread,
    ):
        watch.autocommit = True

        def waits(query: str) -> bool:
            watching.execute(blocked, (query,))
            (found,) = watching.fetchone() or (None,)
            return bool(found)

        asking.execute(f"SELECT id {of_run} AND task_id = 'empty_{WIDE - 1}' FOR UPDATE", (run,))
        holding.execute(f"SELECT id {of_run} FOR UPDATE SKIP LOCKED", (run,))
        client.patch("dags/wide", {"is_paused": False})
        # The scheduler has the run, and wants the tasks.
        assert wait_until(lambda: waits("UPDATE task_instance%"), TIMEOUT)
        marked = thread.submit(asking.execute, "UPDATE dag_run SET updated_at = now() WHERE run_id = %s", (run,))
        assert wait_until(lambda: waits("UPDATE dag_run%"), TIMEOUT)
        obstacle.rollback()  # now it wants the one that the request has, which has waited longer for the run

        marked.result(TIMEOUT)
        request.commit()

    assert wait_until(lambda: client.get(f"dags/wide/dagRuns/{run}")["state"] == "success", TIMEOUT, poll=0.3)
    client.patch("dags/wide", {"is_paused": True})


def test_many_change_something_at_once(client: Client) -> None:
    """Each change also writes an entry of Airflow's log, on the server's event loop.

    Nobody may have to wait for that.
    """

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
    assert {"tasks", "wide"} <= {row["dag_id"] for row in json.loads(output.stdout.splitlines()[-1])}


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


def test_stop_leaves_nothing(client: Client, home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Run(client, tmp_path / "run").wait_until_started()
    found = everything(home)
    log = home / "logs" / "scheduler.log"
    before = len(log.read_text())
    assert call(capsys, "down", "--home", home)[:2] == (0, "stopped\n")
    assert_gone(found, home, timeout=0)
    # The task was asked to end, and could still tell that it did.
    assert "final_state=failed" in log.read_text()[before:]
    code, output, _ = call(capsys, "down", "--home", home)
    assert code == 0 and "nothing runs" in output


UP = [sys.executable, "-m", "operators.service", "up", "--no-fsync"]


def wait_until_begun(home: Path, components: int = 3) -> State:
    """Wait until so many components of a service have been started.

    The database comes first, before Airflow is imported.
    """

    def begun() -> bool:
        state = State.read(Home(home))
        return state is not None and len(state.components) >= components

    assert wait_until(begun, TIMEOUT)
    state = State.read(Home(home))
    assert state is not None
    return state


@pytest.fixture
def foreground(home: Path, dags: Path, tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A service in the foreground, as soon as its first component has been started.

    What lies in its working directory takes the place of no module.
    """
    (tmp_path / "airflow.py").write_text("raise RuntimeError('this is not Airflow')\n")
    command = [*UP, f"--home={home}", f"--dags={dags}"]
    with (tmp_path / "said").open("w") as said:
        process = subprocess.Popen(command, stderr=said, cwd=tmp_path)
    try:
        assert wait_until_begun(home, 1).guard.pid == process.pid
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


@pytest.mark.parametrize(("number", "components"), [(signal.SIGINT, 1), (signal.SIGTERM, 3), (signal.SIGHUP, 1)])
def test_signal_ends_everything(
    number: signal.Signals, components: int, foreground: subprocess.Popen[bytes], home: Path, tmp_path: Path
) -> None:
    wait_until_begun(home, components)
    found = everything(home)
    foreground.send_signal(number)
    assert foreground.wait(TIMEOUT) == 0, (tmp_path / "said").read_text()
    assert_gone(found, home, timeout=0)


def test_killed_guard_leaves_nothing(foreground: subprocess.Popen[bytes], home: Path) -> None:
    wait_until_begun(home)
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
    state = wait_until_begun(home)
    found = everything(home)
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
    # To load plugins, Airflow needs its set-up, so that components can't be forked.
    environment = {"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN": conn, "AIRFLOW__CORE__LAZY_LOAD_PLUGINS": "False"}
    with pytest.raises(ServiceError, match="can't be set up") as failed:
        start(home, dags=dags, environment=environment)
    assert 'connection to server at "127.0.0.1", port 9 failed' in str(failed.value) and "migrate.log" in str(
        failed.value
    )
    assert not (home / "postgres").exists()
    assert processes.with_variable(SUPERVISED, str(home)) == []


def test_an_airflow_that_can_not_be_imported_is_told(dags: Path, tmp_path: Path) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "sqlalchemy.py").write_text("raise ImportError('half an installation')\n")
    told = r"Airflow can't be imported: ImportError: half an installation \(.*/sqlalchemy.py, line 1\)"
    with pytest.raises(ServiceError, match=told):
        start(tmp_path / "home", dags=dags, durable=False, environment={"PYTHONPATH": str(tmp_path / "modules")})
    assert not (tmp_path / "home" / "service.json").exists()


def test_a_command_that_airflow_waits_for_while_it_is_imported_is_not_waited_for_longer(
    dags: Path, tmp_path: Path
) -> None:
    with pytest.raises(ServiceError, match=r"Airflow could not be imported within . s"):
        start(
            tmp_path / "home",
            dags=dags,
            environment={"AIRFLOW__DATABASE__SQL_ALCHEMY_CONN_CMD": "sleep 600"},
            timeout=5,
        )
    assert not (tmp_path / "home" / "service.json").exists()


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
